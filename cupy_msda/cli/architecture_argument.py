"""A compute capability as text, for the commands: `8.6`, `86` or `sm_86`."""

from __future__ import annotations

import re

from .output import CommandError


def read(text: str, option: str) -> int:
    """86 for `8.6`.

    Raises
    ------
    CommandError
        For a text that is none.
    """
    match = re.fullmatch(r"(?:sm_)?([0-9]{1,2})\.?([0-9])", text.strip())
    if match is None:
        raise CommandError(f"{option}: expected a compute capability such as 8.6, 86 or sm_86, got {text!r}")
    return int("".join(match.groups()))
