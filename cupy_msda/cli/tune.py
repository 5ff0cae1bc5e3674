"""``python -m cupy_msda tune``: measure launch configurations, and show, delete and exchange what was measured."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .. import arrays
from ..cuda.tuner.tune import tune
from ..cuda.tuning import file_format, loaded, storage
from ..cuda.tuning.tuned import Entry
from . import environment, sizes_argument
from .output import CommandError, complain, reason_of, say, sentence

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def add(commands: Any) -> None:
    """The parser of the command."""
    words = "find the fastest launch configurations on this GPU"
    notes = (
        f"Nothing else should use the GPU meanwhile. Ctrl-C keeps what was found. Results go to the folder that "
        f"{storage.VARIABLE} names (default: ~/.cupy_msda/tuning; 'off': no tuning), one file per GPU model."
    )
    parser = commands.add_parser("tune", help=words, description=f"{sentence(words)} {notes}")
    parser.add_argument("--sizes", action="append", metavar="TEXT", help=sizes_argument.HELP)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        type=sizes_argument.dtypes,
        default=["float32"],
        help=f"{sizes_argument.DTYPES_HELP}; float16 alone is both (default: float32)",
    )
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    parser.add_argument("--budget", metavar="TIME", help="stop after so long: 60s, 5m")
    parser.add_argument("--device", type=int, help="number of the CUDA device (default: the current one)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print what was found before, and measure nothing")
    instead.add_argument("--clear", action="store_true", help="delete what was found for all GPU models")
    instead.add_argument("--export", type=Path, metavar="FILE", help="write what was found on this GPU model to a file")
    instead.add_argument("--import", type=Path, metavar="FILE", dest="imported", help="take over an exported file")


def run(options: argparse.Namespace) -> int:
    try:
        if options.show:
            return _show()
        if options.clear:
            return _clear()
        if options.export:
            return _export(options.export, options.device)
        if options.imported:
            return _import(options.imported)
        return _tune(options)
    except OSError as error:
        raise CommandError(f"{error.filename or 'a tuning file'}: {reason_of(error)}") from error


def _tune(options: argparse.Namespace) -> int:
    environment.refuse_wrong_variables()
    sizes = None if options.sizes is None else [sizes_argument.read(text) for text in options.sizes]
    budget = None if options.budget is None else _seconds(options.budget)
    settings = {"backward": not options.forward, "budget": budget, "device": options.device}
    try:
        found = tune(sizes, options.dtypes, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        complain("cupy_msda tune: what was found is kept: `python -m cupy_msda tune --show`")
        raise
    for entry in found:
        say(_row(entry))
    faster = sum(bool(entry.axes) for entry in found)
    say(f"{len(found)} kernels and ways measured; for {faster} another configuration than the default is faster")
    say(f"{'kept in':12}{storage.folder() or f'this process alone ({storage.VARIABLE} is off)'}")
    return 0


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or float(match[1]) == 0:
        raise CommandError(f"--budget: expected a time such as 60s or 5m, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


def _row(entry: Entry) -> str:
    subject, sizes = entry.subject, entry.sizes
    name = f"{subject.name} (in order)" if subject.deterministic else subject.name
    call = (
        f"N={sizes.N} Q={sizes.Q} S={sizes.S} M={subject.M} D={subject.D} points={','.join(map(str, subject.points))}"
    )
    axes = " ".join(f"{axis}={value}" for axis, value in sorted(entry.axes.items())) or "the default"
    dtypes = "/".join(dict.fromkeys((subject.value_dtype, subject.location_dtype)))
    times = f"{entry.default_us:9.1f} us -> {entry.tuned_us:9.1f} us"
    return f"{name:27}{dtypes:17}{times}  {call}{' fused' if subject.fused else ''}: {axes}"


def _files() -> list[Path]:
    folder = storage.folder()
    return sorted(folder.glob("*.json")) if folder is not None and folder.is_dir() else []


def _show() -> int:
    say(f"{'folder':12}{storage.folder() or f'none, {storage.VARIABLE} is off'}")
    files = _files()
    if not files:
        say("nothing is tuned")
    for path in files:
        try:
            contents = storage.read(path)
        except ValueError as error:
            say(f"{path.name}: no tuning file: {error}")
            continue
        for key, entries in contents.tuned.items():
            say(f"{contents.gpu}: {key}")
            for entry in entries:
                say(f"  {_row(entry)}")
    return 0


def _clear() -> int:
    files = _files()
    if not files:
        say(f"nothing to delete in {storage.folder() or f'any folder, {storage.VARIABLE} is off'}")
    for path in files:
        if storage.is_ours(path):
            path.unlink()
            say(f"{'deleted':12}{path}")
        else:
            say(f"{'kept':12}{path}, which is no tuning file")
    return 0


def _export(target: Path, device: int | None) -> int:
    source = _file_of(device)
    try:
        contents = storage.read(source)
    except ValueError as error:
        raise CommandError(f"{source} is no tuning file: {error}") from error
    target.write_text(file_format.encode(contents), encoding="utf-8")
    say(f"{'exported':12}{source} to {target}")
    return 0


def _file_of(device: int | None) -> Path:
    """The tuning file of a device; without a GPU, the only one that there is."""
    files = _files()
    if arrays.cuda_unavailable() is None:
        number: int = arrays.require_cupy("tune").cuda.runtime.getDevice() if device is None else device
        path = storage.path_of(loaded.name_of(number))
        if path in files:
            return path
    elif len(files) == 1:
        return files[0]
    raise CommandError("there is nothing to export: `python -m cupy_msda tune --show` lists what was found")


def _import(source: Path) -> int:
    try:
        contents = storage.read(source)
    except ValueError as error:
        raise CommandError(f"{source} is no tuning file: {error}") from error
    path = storage.path_of(contents.gpu)
    if path is None:
        raise CommandError(f"{storage.VARIABLE} is off: expected the name of a folder")
    storage.merge(path, contents)
    say(f"{'imported':12}{sum(map(len, contents.tuned.values()))} entries for {contents.gpu} to {path}")
    return 0
