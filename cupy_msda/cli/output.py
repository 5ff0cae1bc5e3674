"""What the commands print, and the error that ends one of them with a sentence."""

from __future__ import annotations

import contextlib
import os
import sys


class CommandError(Exception):
    """A request that cannot be met, in one sentence."""


class OutputError(Exception):
    """Standard output takes nothing more; `status` is the exit status."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")
        # A closed pipe is how `| head` ends a command: it counts as the signal SIGPIPE.
        self.closed = isinstance(error, BrokenPipeError)
        self.status = 141 if self.closed else 2


def say(text: str) -> None:
    """Print a line. A character that the terminal's encoding lacks is written as its escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    except OSError as error:
        raise OutputError(error) from error


def complain(text: str) -> None:
    """Print a line for the user to standard error, where there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Write what is printed. The interpreter would end in a traceback where this fails at exit."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from error


def discard() -> None:
    """Send what is still to be written to nowhere, so that the interpreter ends quietly."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def sentence(words: str) -> str:
    """`words` with a capital letter and a full stop. ``str.capitalize`` would write GPU in small letters."""
    return f"{words[:1].upper()}{words[1:]}."


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, or its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why a file cannot be used."""
    return getattr(error, "strerror", None) or one_line(error)
