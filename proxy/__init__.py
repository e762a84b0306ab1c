"""A reverse proxy for completion streams; see README.md, section Architecture."""

__version__ = "0.1.0"
