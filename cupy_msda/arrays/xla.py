"""What XLA's flags say, in the environment that XLA reads them from."""

from __future__ import annotations

import os

_DETERMINISTIC = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")


def xla_wants_determinism() -> bool:
    """Whether ``XLA_FLAGS`` ask for deterministic operations; the last of equal flags counts."""
    given = {}
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.partition("=")
        given[name] = value.lower() not in ("false", "0", "f", "no", "n")
    return any(given.get(name, False) for name in _DETERMINISTIC)
