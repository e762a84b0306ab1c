"""Fuzzing: ``python -m tests.fuzz`` (make fuzz) needs the extra "fuzz"."""
