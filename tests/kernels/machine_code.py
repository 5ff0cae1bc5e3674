"""Compares the machine code of every budgeted specialisation between two revisions or folders, without a GPU.

    python -m tests.kernels.machine_code OLD NEW [--arch 90 ...] [--jobs N] [--only SUBSTRING] [--json FILE]
    python -m tests.kernels.machine_code list

Each side says by its own `list` which kernel each problem of the budget asks for. Kernels are paired by that problem,
so names of kernels, axes and macros may differ. Compared are the contents of the code sections, of each constant of
OLD, and registers; not symbols, section names or debug information. Exits with 1 where anything differs, and 0
otherwise.
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
if __name__ == "__main__":  # an installed cupy_msda may be that of another checkout
    sys.path.insert(0, str(ROOT))

import cupy_msda
from cupy_msda.cuda import kernels
from tests.helpers import specialisations
from tests.helpers.specialisations import spelled

ARCHITECTURES = specialisations.ARCHITECTURES
CACHE = Path(tempfile.gettempdir()) / f"cupy_msda_machine_code_{os.getuid()}"
INSTRUCTION = 16  # bytes, from sm_70 on


# What a checkout asks for: `list`.


@functools.cache
def _values():
    """Values of each axis by their text; those of AXES come first."""
    found = {axis: {spelled(value): value for value in values} for axis, values in specialisations.AXES.items()}
    for row in specialisations.common_rows():
        for axis, value in row.items():
            found[axis].setdefault(spelled(value), value)
    return found


def row_of(text):
    """The row that a text stands for, None where this checkout has no such problem.

    An axis that the text does not name has its first value: the other side may not have that axis.
    """
    named = dict(part.split("=", 1) for part in text.split("; "))
    if named.keys() <= set(specialisations.OTHER_AXES):
        return next((row for row in specialisations.dtype_rows() if specialisations.text_of(row) == text), None)
    values = _values()
    if any(value not in values.get(axis, ()) for axis, value in named.items()):
        return None
    return {axis: known[named.get(axis, next(iter(known)))] for axis, known in values.items()}


def listed(architectures, texts=()):
    """Every kernel that the problems of the budget and those of `texts` ask for, by architecture and label."""
    rows = {specialisations.text_of(row): row for row in specialisations.budgeted_rows()}
    rows |= {text: row for text in texts if (row := row_of(text)) is not None}
    sources, asked = {}, {}
    for architecture in architectures:
        of_architecture = asked[str(architecture)] = {}
        for label, spec in specialisations.specs_of(rows.values(), architecture).items():
            source = kernels.program(spec)
            name = hashlib.sha256(source.encode()).hexdigest()
            sources[name] = source
            of_architecture[label] = {
                "source": name,
                "options": specialisations.flags(architecture),
                "kernel": spec.function,
            }
    return {"problems": list(rows), "sources": sources, "kernels": asked}


# One kernel: from its source to its machine code.


def sections(cubin):
    """Name, type and contents of each section of a 64-bit ELF file."""
    assert cubin[:6] == b"\x7fELF\x02\x01", "expected a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + entry_size * index) for index in range(count)]
    names = headers[of_names][4]
    for name, kind, _, _, offset, size in headers:
        start = names + name
        contents = b"" if kind == 8 else cubin[offset : offset + size]  # SHT_NOBITS has none
        yield cubin[start : cubin.index(b"\0", start)].decode(), kind, contents


def code_of(cubin):
    """Contents of the code sections, and of each constant, in an order that does not depend on names.

    Constant bank 0 is left out: it has the place of the parameters, which the code says itself.
    """
    found = list(sections(cubin))
    code = sorted(contents for name, _, contents in found if name.startswith(".text."))
    data = []
    for symbols in (contents for _, kind, contents in found if kind == 2):  # SHT_SYMTAB
        for _, info, _, section, value, size in struct.iter_unpack("<IBBHQQ", symbols):
            if info & 15 == 1 and section < len(found):  # STT_OBJECT
                name, _, contents = found[section]
                if re.match(r"\.nv\.(constant[1-9]|global\.init)", name):
                    data.append(contents[value : value + size])
    return code, sorted(data)


def measure(text, options, kernel):
    """Machine code and resources of one kernel, from the cache where it is there."""
    from cupy_backends.cuda.libs import nvrtc

    task = repr(("constants one by one", text, tuple(options), kernel, nvrtc.getVersion()))
    cached = CACHE / hashlib.sha256(task.encode()).hexdigest()
    if cached.exists():
        return json.loads(cached.read_text())
    program = nvrtc.createProgram(text, f"{kernel}.cu", (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    code, data = code_of(nvrtc.getCUBIN(program))
    log = nvrtc.getProgramLog(program).replace("\0", "")
    log = log[log.index(f"Compiling entry function '{kernel}'") :]
    shared = re.search(r"Used .*?(\d+) bytes smem", log)
    found = {
        "code": [base64.b64encode(contents).decode() for contents in code],
        "data": [base64.b64encode(contents).decode() for contents in data],
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
        "shared": int(shared[1]) if shared else 0,
        "instructions": sum(map(len, code)) // INSTRUCTION,
    }
    CACHE.mkdir(exist_ok=True)
    written = cached.with_name(f"{cached.name}.{os.getpid()}")
    written.write_text(json.dumps(found))
    written.replace(cached)
    return found


def measure_all(tasks, jobs):
    """What `measure` says by task, of which `tasks` holds labels; in `jobs` processes."""
    found, begin, shown = {}, time.monotonic(), 0.0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measure, *task): task for task in tasks}
        for future in as_completed(waiting):
            task = waiting[future]
            try:
                found[task] = future.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"does not compile: {tasks[task]}\n{' '.join(task[1])}\n{error}") from None
            if (now := time.monotonic() - begin) > shown + 5 or len(found) == len(tasks):
                shown = now
                print(f"compiled {len(found)} of {len(tasks)} kernels in {now:.0f} s", file=sys.stderr, flush=True)
    return found


# Two sides.


def differs(old, new):
    """Whether two kernels differ.

    A constant more is no difference: NVRTC keeps every constexpr variable, whether it is used or not.
    """
    lost = Counter(old["data"]) - Counter(new["data"])
    return bool(lost) or any(old[what] != new[what] for what in ("code", "registers", "shared"))


def compare(old, new):
    """Labels that are equal, that differ and that only one side has: from label to what `measure` says."""
    both = [label for label in old if label in new]
    different = [label for label in both if differs(old[label], new[label])]
    resources = ("registers", "spilled", "shared", "instructions")
    return {
        "equal": [label for label in both if label not in set(different)],
        "different": {label: {what: [old[label][what], new[label][what]] for what in resources} for label in different},
        "only in old": [label for label in old if label not in new],
        "only in new": [label for label in new if label not in old],
    }


@contextlib.contextmanager
def checked_out(side):
    """The folder of one side: itself, or a temporary one with the files of a revision."""
    if Path(side).is_dir():
        yield Path(side).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="cupy_msda_revision_") as folder:
        packed = subprocess.run(["git", "-C", ROOT, "archive", side], stdout=subprocess.PIPE)
        if packed.returncode:
            raise SystemExit(f"expected a folder or a git revision, got {side}")
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


def listing(folder, architectures, texts=()):
    """What `list` says in a checkout."""
    command = next((folder / "tests").rglob(Path(__file__).name), None)
    if command is None:
        raise SystemExit(f"{folder} is older than this command: it has no {Path(__file__).name}")
    arguments = [sys.executable, command, "list", "--arch", *map(str, architectures), "--problems", "-"]
    # With a cache of bytecode, a listing would leave files in a folder of the caller's.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        arguments, cwd=folder, env=environment, input=json.dumps(list(texts)), stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise SystemExit(f"{command} list failed")
    return json.loads(result.stdout)


def renamed(text, renames, back=False):
    """A label of OLD in the words of NEW, or back."""
    for old, new in reversed(renames) if back else renames:
        text = text.replace(new, old) if back else text.replace(old, new)
    return text


def _tasks(side, only, renames=()):
    """What to measure, by architecture and label, for the labels that have `only` in them."""
    found = {architecture: {} for architecture in side["kernels"]}
    for architecture, asked in side["kernels"].items():
        for label, entry in asked.items():
            if only in (label := renamed(label, renames)):
                task = (side["sources"][entry["source"]], tuple(entry["options"]), entry["kernel"])
                found[architecture][label] = task
    return found


def compare_sides(old_side, new_side, architectures, jobs, only="", renames=()):
    """The comparison of two sides by architecture."""
    with checked_out(old_side) as old_folder, checked_out(new_side) as new_folder:
        old = listing(old_folder, architectures)
        new = listing(new_folder, architectures, [renamed(text, renames) for text in old["problems"]])
        old = listing(old_folder, architectures, [renamed(text, renames, back=True) for text in new["problems"]])
    sides = [_tasks(old, only, renames), _tasks(new, only)]
    # What only one side has needs no machine code.
    tasks = {
        task: label
        for of_old, of_new in zip(*(side.values() for side in sides), strict=True)
        for label in of_old.keys() & of_new.keys()
        for task in (of_old[label], of_new[label])
    }
    measured = measure_all(tasks, jobs)
    found = {}
    for architecture in map(str, architectures):
        old, new = (side[architecture] for side in sides)
        found[architecture] = compare(
            {label: measured.get(task) for label, task in old.items()},
            {label: measured.get(task) for label, task in new.items()},
        )
        # Problems whose kernels are the same pair differ together: shown once.
        pairs = Counter((old[label], new[label]) for label in found[architecture]["different"])
        shown = set()
        for label, entry in found[architecture]["different"].items():
            pair = old[label], new[label]
            entry["shared by"] = 0 if pair in shown else pairs[pair]
            shown.add(pair)
    return found


def report(found):
    """Lines that say what a comparison found."""
    for architecture, compared in found.items():
        only = [(side, label) for side in ("only in old", "only in new") for label in compared[side]]
        equal, different = len(compared["equal"]), len(compared["different"])
        yield f"sm_{architecture}: {equal} equal, {different} different, {len(only)} only in one"
        for label, entry in compared["different"].items():
            if entry["shared by"]:
                others = f" (and {entry['shared by'] - 1} more problems)" if entry["shared by"] > 1 else ""
                numbers = ((what, *entry[what]) for what in ("registers", "spilled", "instructions"))
                yield f"  different: {label}{others}"
                yield "    " + ", ".join(f"{what} {before} -> {after}" for what, before, after in numbers)
        yield from (f"  {side}: {label}" for side, label in only)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compare the machine code of all budgeted specialisations.")
    parser.add_argument("sides", nargs="+", metavar="SIDE", help="OLD and NEW, revisions or folders; or: list")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), help="default: those of the budget")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only problems whose label has it")
    parser.add_argument(
        "--rename", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="words of labels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there too")
    parser.add_argument("--problems", metavar="FILE", help="list: JSON with further problems, - for standard input")
    given = parser.parse_args(arguments)
    if given.sides == ["list"]:
        if ROOT not in Path(cupy_msda.__file__).resolve().parents:
            raise SystemExit(f"expected cupy_msda of {ROOT}, got {cupy_msda.__file__}")
        texts = (
            sys.stdin.read() if given.problems == "-" else Path(given.problems).read_text() if given.problems else "[]"
        )
        json.dump(listed(given.arch, json.loads(texts)), sys.stdout)
        return 0
    if len(given.sides) != 2:
        parser.error(f"expected OLD and NEW, or list, got {' '.join(given.sides)}")
    found = compare_sides(*given.sides, given.arch, given.jobs, given.only, given.rename)
    print("\n".join(report(found)))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(compared[what] for compared in found.values() for what in compared if what != "equal"))


if __name__ == "__main__":
    sys.exit(main())
