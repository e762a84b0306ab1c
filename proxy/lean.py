"""Imports aiohttp without what only its client needs. To be imported before it.

Nothing here uses that client, but it comes with the server: it loads all certificates
of authorities that the system trusts (2.7 MB), and lists that can be frozen, compiled,
which load the whole runtime library of C++ (1.1 MB). To a proxy that stands idle beside
a model that is most of what could be saved.
"""

import os
import sys

# OpenSSL's names for where certificates are, and frozenlist's for its other half.
MEANWHILE = {
    "SSL_CERT_FILE": os.devnull,
    "SSL_CERT_DIR": os.devnull,
    "FROZENLIST_NO_EXTENSIONS": "1",
}


def _import() -> None:
    before = {name: os.environ.get(name) for name in MEANWHILE}
    os.environ.update(MEANWHILE)
    try:
        import aiohttp.web  # noqa: F401
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if "aiohttp" not in sys.modules:
    _import()
