"""The variables of the environment whose names begin with CUPY_MSDA_."""

from __future__ import annotations

import os


def setting(name: str) -> str | None:
    """The value of a variable; None where it is not set, or empty, as a shell or a container leaves an unset one."""
    given = os.environ.get(name, "")
    return given if given.strip() else None
