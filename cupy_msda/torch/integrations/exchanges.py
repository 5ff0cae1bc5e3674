"""What has been exchanged in other packages: each once, also for several patches, until the last one is undone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

lock = threading.RLock()


@dataclass
class _Exchange:
    answer: Any
    undo: Callable[[], None]
    users: int = 0


# By what has been exchanged: a function, an autograd function, the name of a compiled one, or an attribute.
_exchanges: dict[Any, _Exchange] = {}


def answer_of(key: Any) -> Any:
    """What answers instead of the original, or None where nothing has been exchanged."""
    found = _exchanges.get(key)
    return None if found is None else found.answer


def add(key: Any, answer: Any, undo: Callable[[], None]) -> None:
    """Note an exchange that has been made, and how it is undone. :func:`use` follows."""
    _exchanges[key] = _Exchange(answer, undo)


def use(key: Any) -> Callable[[], None]:
    """One more patch that needs it. Returns what that patch calls at its end; the last one restores the original."""
    _exchanges[key].users += 1
    return functools.partial(_release, key)


def _release(key: Any) -> None:
    found = _exchanges[key]
    found.users -= 1
    if not found.users:
        del _exchanges[key]
        found.undo()
