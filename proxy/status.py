"""What runs, and how a command ends: its exit status, what it says when it fails."""

import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec

from proxy import __version__
from proxy.errors import ConfigError


def version() -> str:
    """Say also whether this is what ``deploy/compile.py`` makes of it."""
    found = find_spec("proxy.relay")
    is_compiled = found is not None and isinstance(found.loader, ExtensionFileLoader)
    return f"{__version__} (compiled)" if is_compiled else __version__


def say(text: str) -> None:
    """To the person at the terminal; the standard output is for the log."""
    print(text, file=sys.stderr, flush=True)


def guarded(command: Callable[[], int]) -> int:
    """Return the command's exit status, also when it fails as it may."""
    try:
        return command()
    except ConfigError as error:
        say("The configuration cannot be used:")
        for problem in error.problems:
            say(f"  - {problem}")
        return 2
    except OSError as error:
        say(f"error: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        return 130
