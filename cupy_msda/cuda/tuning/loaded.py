"""What tuning has found, in this process: read from the file of a device when a call first plans there, and stored."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import arrays
from ...version import __version__
from .. import gpu
from ..gpu import Gpu
from . import storage
from .file_format import Key, TuningFile
from .tuned import NONE, Choices, Entry

_choices: dict[int, Choices] = {}
_lock = threading.Lock()
_changed: list[Callable[[], None]] = []


def gpu_of(device: int) -> Gpu:
    """The description of a device, with what has been measured there."""
    found = _choices.get(device)
    if found is None:
        with _lock:
            found = _choices.get(device)
            if found is None:
                found = _choices[device] = _load(device)
    return replace(gpu.of_device(device), choices=found)


def when_changed(forget: Callable[[], None]) -> None:
    """Call `forget`, which drops prepared launches, whenever the choices change or calls are to be recorded."""
    _changed.append(forget)


def forget_launches() -> None:
    """Have every call planned anew."""
    for forget in _changed:
        forget()


def reload() -> None:
    """Read the files again when a call next plans."""
    with _lock:
        _choices.clear()
    forget_launches()


def name_of(device: int) -> str:
    """The name of the GPU model."""
    properties: Any = arrays.require_cupy("tuning").cuda.runtime.getDeviceProperties(device)
    return str(properties["name"].decode())


def key_of(device: int) -> Key:
    """What entries are measured with on a device."""
    on, runtime = gpu.of_device(device), arrays.require_cupy("tuning").cuda.runtime
    capability = f"{on.architecture // 10}.{on.architecture % 10}"
    return Key(__version__, capability, on.multiprocessors, int(runtime.driverGetVersion()))


def store(device: int, entries: Iterable[Entry]) -> Path | None:
    """Add entries to the file of a device, and use them from now on; the file, or None where tuning is off.

    Raises
    ------
    OSError
        Where the file cannot be written.
    """
    entries, name = list(entries), name_of(device)
    path = storage.path_of(name)
    if path is None:
        choices = gpu_of(device).choices
        for entry in entries:
            choices = choices.with_entry(entry)
        with _lock:
            _choices[device] = choices
        forget_launches()
        return None
    storage.merge(path, TuningFile(name, {key_of(device): entries}))
    reload()
    return path


def _load(device: int) -> Choices:
    """The choices in the file of a device: none, and a warning, where it is not for this device and version."""
    folder = storage.folder()
    if folder is None or not folder.is_dir():
        return NONE
    path = storage.path_of(name_of(device))
    if path is None or not path.exists():
        return NONE
    key = key_of(device)
    try:
        tuned = storage.read(path).tuned
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        _warn(f"{path} is ignored ({reason}). `python -m cupy_msda tune --clear` deletes it")
        return NONE
    if tuned and key not in tuned:
        others = "; ".join(map(str, tuned))
        _warn(f"{path} is ignored: it is for {others}; here is {key}. `python -m cupy_msda tune` measures anew")
    return Choices(tuned.get(key, ()))


def _warn(text: str) -> None:
    warnings.warn(f"tuned launch configurations: {text}.", RuntimeWarning, stacklevel=2)
