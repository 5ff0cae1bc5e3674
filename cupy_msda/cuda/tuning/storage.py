"""Tuning files on the disk: one per GPU model. Readers never see a part of a file, and writers lose no entry."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ... import variables
from .file_format import TuningFile, decode, encode

VARIABLE = "CUPY_MSDA_TUNING"
_OFF = ("off", "0")
# A writer holds the lock for milliseconds. One that is this old is that of a process that has died.
_STALE_SECONDS = 10.0
# How every file of ours begins, also one of another version or a part of one.
_BEGIN = '{"format": '
# No file of measured choices is larger.
_MOST_BYTES = 64 << 20


def folder() -> Path | None:
    """Where tuning files are, or None where they are switched off."""
    setting = variables.setting(VARIABLE)
    if setting is None:
        return Path("~/.cupy_msda/tuning").expanduser()
    return None if setting.strip().lower() in _OFF else Path(setting)


def path_of(gpu_name: str) -> Path | None:
    """The file of a GPU model, or None where tuning is switched off."""
    found, stem = folder(), re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_")
    return None if found is None else found / f"{stem or 'gpu'}.json"


def read(path: Path) -> TuningFile:
    """The contents of a file.

    Raises
    ------
    OSError, ValueError
        For a file that cannot be read, or that is none of ours.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"expected at most {_MOST_BYTES >> 20} MiB")
    return decode(path.read_text(encoding="utf-8"))


def is_ours(path: Path) -> bool:
    """Whether a file looks like a tuning file, of whatever version, whole or not."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN.encode()
    return False


def merge(path: Path, contents: TuningFile) -> None:
    """Add entries to a file. They replace those for the same problems.

    A file that cannot be read is replaced; one that is not ours is first renamed, with `.bak` at its end.

    Raises
    ------
    OSError
        Where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        try:
            before = read(path)
        except (OSError, ValueError):
            before = TuningFile(contents.gpu, {})
            if path.exists() and not is_ours(path):
                os.replace(path, path.with_name(f"{path.name}.bak"))
        tuned = {key: list(entries) for key, entries in before.tuned.items()}
        for key, entries in contents.tuned.items():
            combined = {(entry.subject, entry.sizes): entry for entry in (*tuned.get(key, ()), *entries)}
            tuned[key] = list(combined.values())
        _replace(path, encode(TuningFile(before.gpu, tuned)))


def _replace(path: Path, text: str) -> None:
    """The new contents at once: a reader has the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, on every system. A lock that a dead process has left is taken over.

    Raises
    ------
    OSError
        Where the folder cannot be written, or where such a lock cannot be deleted.
    """
    lock, give_up = path.with_suffix(".lock"), time.monotonic() + 3 * _STALE_SECONDS
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except (FileExistsError, PermissionError):  # Windows refuses a file that is being deleted
            with contextlib.suppress(OSError):
                if time.time() - lock.stat().st_mtime > _STALE_SECONDS:
                    lock.unlink()
                    continue
            if time.monotonic() > give_up or (not lock.exists() and not os.access(path.parent, os.W_OK)):
                raise
            time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
