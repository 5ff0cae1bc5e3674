"""The variables of the environment that this package reads, before a command computes anything."""

from __future__ import annotations

from ..cpu import threads, tier
from ..cuda import naive
from .output import CommandError


def refuse_wrong_variables() -> None:
    """CommandError for a variable with which every call fails."""
    try:
        threads.num_threads()
        naive.selected()
        tier.compiled_tier()
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
