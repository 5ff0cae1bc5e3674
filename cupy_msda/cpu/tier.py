"""Which of the two implementations of the CPU path runs: NumPy's, or the loops that numba compiles.

``CUPY_MSDA_CPU`` decides. Without it, numba runs where it can be imported.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .. import variables
from ..requirements import install


def compiled_tier() -> ModuleType | None:
    """The module :mod:`.compiled.run` where it runs, otherwise None.

    Raises
    ------
    ValueError
        For a value of ``CUPY_MSDA_CPU`` other than ``numpy`` and ``numba``.
    RuntimeError
        Where ``CUPY_MSDA_CPU`` is ``numba``, which cannot be imported.
    """
    setting = variables.setting("CUPY_MSDA_CPU")
    if setting == "numpy":
        return None
    if setting not in (None, "numba"):
        raise ValueError(f"CUPY_MSDA_CPU: expected 'numpy' or 'numba', got {setting!r}")
    found = _load()
    if isinstance(found, ModuleType):
        return found
    if setting == "numba":
        raise RuntimeError(f"CUPY_MSDA_CPU: numba cannot be used, because {found}: {install('numba')}")
    return None


def describe() -> str:
    """The tier that runs, and why not the other."""
    try:
        if compiled_tier() is not None:
            return "numba"
    except (RuntimeError, ValueError) as error:
        return f"fails: {error}"
    if variables.setting("CUPY_MSDA_CPU") == "numpy":
        return "NumPy (CUPY_MSDA_CPU=numpy)"
    return f"NumPy, because {_load()}: {install('numba')}"


@functools.cache
def _load() -> ModuleType | str:
    """The compiled tier, or why it cannot be imported."""
    try:
        return importlib.import_module(".compiled.run", __package__)
    except ModuleNotFoundError:
        return "numba is not installed"
    except Exception as error:  # numba refuses a NumPy that it does not know, with ImportError or others
        return f"its import fails with {type(error).__name__}: {error}"
