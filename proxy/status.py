"""How a command ends: its exit status, and what it says when it fails."""

import sys
from collections.abc import Callable

from proxy.errors import ConfigError


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
