"""Every kernel that the planner can choose, compiled without a GPU and held against a budget.

`python -m tests.helpers.specialisations` writes tests/kernels/kernel_budget.json anew, for the NVRTC that is installed.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from cupy_msda.call import ALL, FusedFrontEnd, Problem, ValueStrides, Variant
from cupy_msda.cuda import kernels, naive, plan, plan_backward, sorted_heuristics
from cupy_msda.cuda.gpu import ARCHITECTURES, H100
from tests.helpers import cases
from tests.helpers.cases import DTYPE_PAIRS

BUDGET = Path(__file__).parent.parent / "kernels" / "kernel_budget.json"
CACHE = Path(tempfile.gettempdir()) / f"cupy_msda_compiled_{os.getuid()}"
LEVELS = ((100, 167, 0), (50, 84, 16700), (25, 42, 20900), (13, 21, 21950))

WANTED = {cases.gradient_names(wanted): wanted for wanted in (ALL, *cases.PARTIAL_GRADIENTS)}
# The axes of a problem that the planner looks at, with values on both sides of each of its decisions.
AXES = {
    "pair": DTYPE_PAIRS,
    "D": (1, 2, 3, 16, 30, 32, 33, 64, 128, 256, 1025),
    "alignment": (16, 4),
    "points": ((4, 4), (1, 1), (3, 30)),  # L, P
    "queries": ("few", "many", "pixels"),
    "levels": ("on the host", "on the device"),
    "size": ("32 bits", "64 bits"),
    "wanted": ("output", *WANTED, *(f"value in order: {kind}" for kind in ("sort", "both", "sum"))),
    "layout": ("contiguous", "strided", "padded"),
    "front": ("none", "points", "boxes, packed"),
    "variant": ("plain", "points", "nearest", "border", "align corners", "border, align corners", "nearest, points"),
}

# The axes of the kernels that depend on dtypes alone.
OTHER_AXES = ("value", "naive")


def variant_of(described, L, P):
    num_points = (*range(P - 1, P + L - 2), P + 1) if "points" in described and L > 1 else None
    return Variant(
        num_points,
        "nearest" if "nearest" in described else "bilinear",
        "border" if "border" in described else "zeros",
        "align corners" in described,
    )


def problem_of(row):
    """The problem with these properties: a value for each of AXES."""
    L, P = row["points"]
    S = 22223 if row["size"] == "32 bits" else 2**31
    Q = {"few": 50, "many": 20000, "pixels": S}[row["queries"]]
    D, form, pair = row["D"], variant_of(row["variant"], L, P), row["pair"]
    return Problem(
        2, S, 8, D, L, 0 if form.num_points else P, Q, *pair, ("cuda", 0),
        LEVELS[:L] if row["levels"] == "on the host" else None,
        variant=form, value_strides=ValueStrides(16 * S * D, 16 * D, D) if row["layout"] == "strided" else None,
        ragged=row["layout"] == "padded",
        fused={"points": FusedFrontEnd(2, L, pair[0], False), "boxes, packed": FusedFrontEnd(4, 1, pair[1], True)}.get(
            row["front"]
        ),
    )  # fmt: skip


def gradients_of(row):
    """The gradients that a row asks for; those of logits and reference points come with each other."""
    wanted = WANTED[row["wanted"]]
    return wanted._replace(references=row["front"] != "none" and wanted.weights)


def launches_of(row, gpu=H100):
    """The planner's answer to a row of the budget: launches by their role in the problem, the budgeted one first."""
    if "value" in row:
        return {"cast": plan.cast_gradient(row["value"], 1000)}
    if "naive" in row:
        value_dtype, location_dtype = row["naive"]
        fused = FusedFrontEnd(2, 4, location_dtype, False)
        found = Problem(1, 1, 1, 1, 4, 4, 1, value_dtype, location_dtype, ("cuda", 0), None, fused=fused)
        return {kernel: plan.over_elements(spec, 1000) for kernel, spec in naive.specs(found).items()}
    found, alignment, wanted = problem_of(row), row["alignment"], row["wanted"]
    if wanted == "output":
        return {"forward": plan.forward(found, alignment, gpu)}
    if "in order" in wanted:
        sort, reduce = plan_backward.summation(found, alignment, gpu).launches
        first = {"sort": sort}
        if sorted_heuristics.is_materialised(found):
            first = {"expand": plan.materialise(found)}
        return {"sort": first, "both": {"sort": sort, "sum": reduce}, "sum": {"sum": reduce}}[wanted.split()[-1]]
    wanted = gradients_of(row)
    aggregated = found.Q * found.K >= 4 * found.S
    backward = {"backward": plan.backward(found, alignment, gpu, found.computed(wanted), aggregated)}
    return backward | ({"references": plan.reduce_references(found)} if wanted.references else {})


def gpu_of(architecture):
    """The GPU that stands for an architecture; with as many multiprocessors as an H100, for the same choices."""
    return replace(ARCHITECTURES[architecture], multiprocessors=H100.multiprocessors)


def specs_of(rows, architecture):
    """The specialisations that rows ask for on an architecture, by their labels."""
    gpu = gpu_of(architecture)
    return {f"{text_of(row)}: {role}": launch.spec for row in rows for role, launch in launches_of(row, gpu).items()}


def text_of(row):
    """A row of the budget as text: what a problem is called, whatever its kernels are called."""
    return "; ".join(f"{axis}={spelled(row[axis])}" for axis in (*AXES, *OTHER_AXES) if axis in row)


def spelled(value):
    """A value of an axis as text."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def every_row():
    """All rows; variants and layouts only with the alignment and the sizes that they usually come with."""
    names = list(AXES)
    rows = []
    for combination in itertools.product(*AXES.values()):
        of = dict(zip(names, combination, strict=True))
        usual = (of["alignment"], of["size"]) == (16, "32 bits")
        simple = (of["variant"], of["layout"]) == ("plain", "contiguous")
        if (usual and of["front"] == "none") or (usual and simple) or (simple and of["front"] == "none"):
            rows.append(of)
    return [row for row in rows if is_accepted(row)] + dtype_rows()


def is_accepted(row):
    """Whether the planner has an answer: a fused call may have too many samples for shared memory."""
    try:
        launches_of(row, H100)
    except NotImplementedError:
        return False
    return True


def common_rows():
    """Rows of what models ask for: 4 levels of 4 points, mostly 32 channels."""
    asked = itertools.product(
        DTYPE_PAIRS[1:], ("pixels", "many"), ("output", cases.gradient_names(ALL)), ("none", "points")
    )
    sizes = {"D": 32, "alignment": 16, "points": (4, 4), "levels": "on the device", "size": "32 bits"}
    usual = {"layout": "contiguous", "variant": "plain"}
    names = ("pair", "queries", "wanted", "front")
    found = [dict(zip(names, combination, strict=True)) | sizes | usual for combination in asked]
    pixels = {"pair": ("float32", "float32"), "queries": "pixels", "wanted": "output", "front": "none"}
    return found + [pixels | sizes | usual | {"D": D} for D in (16, 36, 128)]


def dtype_rows():
    """Rows of the kernels that depend on dtypes alone."""
    casts = [{"value": dtype} for dtype in ("float16", "bfloat16")]
    return casts + [{"naive": pair} for pair in DTYPE_PAIRS]


def pairwise_rows():
    """Rows such that any two values of two axes meet in one of them: greedy, and the same every time."""
    names = list(AXES)
    uncovered = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(AXES[names[a]]))
        for j in range(len(AXES[names[b]]))
    }
    chosen = []
    while uncovered:
        a, i, b, j = min(uncovered)
        row = [None] * len(names)
        row[a], row[b] = i, j
        for axis in range(len(names)):
            if row[axis] is None:
                row[axis] = max(range(len(AXES[names[axis]])), key=lambda v, axis=axis: _gain(row, axis, v, uncovered))
        for x, y in itertools.combinations(range(len(names)), 2):
            uncovered.discard((x, row[x], y, row[y]))
        chosen.append({name: AXES[name][v] for name, v in zip(names, row, strict=True)})
    return chosen


def budgeted_rows():
    """The problems of the budget, as plain data."""
    return [*pairwise_rows(), *common_rows(), *dtype_rows()]


def budgeted(architecture=90):
    """The specialisations of the budget, by their labels."""
    return specs_of(budgeted_rows(), architecture)


def _gain(row, axis, value, uncovered):
    pairs = ((axis, value, o, v) if axis < o else (o, v, axis, value) for o, v in enumerate(row) if v is not None)
    return sum(pair in uncovered for pair in pairs)


def flags(architecture):
    """NVRTC options: those of kernels.py, and those that CuPy adds."""
    return (*kernels.OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v", "-ftz=true")


def resources(spec, architecture):
    """Registers, bytes spilled and warnings of one specialisation; raises RuntimeError where it does not compile."""
    from cupy_backends.cuda.libs import nvrtc

    options, text = flags(architecture), kernels.program(spec)
    name = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()[:32]
    cached = CACHE / name
    if cached.exists():
        return json.loads(cached.read_text())
    program = nvrtc.createProgram(text, f"{spec.function}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"sm_{architecture} {spec}\n{nvrtc.getProgramLog(program)}") from error
    log = nvrtc.getProgramLog(program).replace("\0", "")
    assert nvrtc.getCUBIN(program)
    found = {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
        "warnings": [line for line in log.splitlines() if "warning" in line],
    }
    CACHE.mkdir(exist_ok=True)
    cached.write_text(json.dumps(found))
    return found


def _resources(task):
    return resources(*task)


def compile_all(rows, thinned=False):
    """Specialisation and resources of rows by (label, architecture), on all cores.

    `thinned`: all of them for sm_90, and every eighth one, another one each time, for the other architectures.
    """
    asked = {
        (label, architecture): (spec, architecture)
        for column, architecture in enumerate(ARCHITECTURES)
        for number, (label, spec) in enumerate(specs_of(rows, architecture).items())
        if not thinned or architecture == H100.architecture or (number + column) % 8 == 0
    }
    tasks = list(dict.fromkeys(asked.values()))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = dict(zip(tasks, pool.map(_resources, tasks, chunksize=4), strict=True))
    return {problem: (task[0], found[task]) for problem, task in asked.items()}


def nvrtc_version():
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def make_budget():
    """What the budget file should say now: registers, bytes spilled, shared memory, in the order of ARCHITECTURES."""
    entries = {}
    for (label, architecture), (spec, measured) in compile_all(budgeted_rows()).items():
        # The shared memory of the bucket sort depends on S too: tests/kernels/test_plan.py.
        entry = entries.setdefault(label, {"shared": spec.shared_bytes or 0, "registers": [], "spilled": []})
        entry["registers"].append(measured["registers"])
        entry["spilled"].append(measured["spilled"])
        if measured["spilled"]:
            entry["reason"] = reason_of(spec, entry.get("reason"), architecture)
    return {"nvrtc": nvrtc_version(), "architectures": list(ARCHITECTURES), "kernels": dict(sorted(entries.items()))}


def reason_of(spec, before, architecture):
    """Why a specialisation spills, in addition to the reason `before`."""
    if spec.min_blocks * spec.threads * 256 <= 1 << 16:
        found = "a thread can have no more registers"
    elif architecture == H100.architecture:
        found = "on Hopper launches change only where that is measured"
    elif spec.axes().get("value_dtype") == "float64":
        found = "float64, of checks, shares the launch of float32, which does not spill"
    else:
        found = "shares the launch of 32 channels and 16 samples, as models have, which does not spill"
    return "; ".join(dict.fromkeys([*(before.split("; ") if before else ()), found]))


if __name__ == "__main__":
    budget = make_budget()
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in budget["kernels"].items()]
    head = json.dumps({k: budget[k] for k in ("nvrtc", "architectures")}, indent=1)[:-2]
    BUDGET.write_text(head + ',\n "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")
