"""Every kernel that the planner can choose, compiled without a GPU and held against a budget.

`python tests/specialisations.py` writes tests/kernel_budget.json anew, for the NVRTC that is installed.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cupy_msda.call import ALL, FusedFrontEnd, Problem, ValueStrides, Variant
from cupy_msda.cuda import kernels, plan, plan_backward
from tests.helpers import cases
from tests.helpers.cases import DTYPE_PAIRS

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
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
    "levels": ("by value", "on the device"),
    "size": ("32 bits", "64 bits"),
    "wanted": ("output", *WANTED, *(f"value in order: {kind}" for kind in ("sort", "count", "sum"))),
    "layout": ("contiguous", "strided", "padded"),
    "front": ("none", "points", "boxes, packed"),
    "variant": ("plain", "points", "nearest", "border", "align corners", "border, align corners", "nearest, points"),
}


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
    S = 22223 if row["size"] == "32 bits" else 2**28
    Q = {"few": 50, "many": 20000, "pixels": S}[row["queries"]]
    D, form, pair = row["D"], variant_of(row["variant"], L, P), row["pair"]
    return Problem(
        2, S, 8, D, L, 0 if form.num_points else P, Q, *pair, ("cuda", 0),
        LEVELS[:L] if row["levels"] == "by value" else None,
        variant=form, value_strides=ValueStrides(16 * S * D, 16 * D, D) if row["layout"] == "strided" else None,
        ragged=row["layout"] == "padded",
        fused={"points": FusedFrontEnd(2, L, pair[0], False), "boxes, packed": FusedFrontEnd(4, 1, pair[1], True)}.get(
            row["front"]
        ),
    )  # fmt: skip


def launches_of(row):
    """The planner's answer to a row of the budget: launches by their role in the problem, the budgeted one first."""
    if "value" in row:
        return {"cast": plan.round_gradient(row["value"], 1000)}
    found, alignment, wanted = problem_of(row), row["alignment"], row["wanted"]
    if wanted == "output":
        return {"forward": plan.forward(found, alignment)}
    if "in order" in wanted:
        sort, *count, summed = plan_backward.summation(found, alignment).launches
        expand = plan_backward.expansion(found)
        first = {"expand": expand} if expand else {"sort": sort}
        counted = {"count": count[0]} if count else {"sort": sort}
        return {"sort": first, "count": counted, "sum": {"sum": summed}}[wanted.split()[-1]]
    wanted = WANTED[wanted]._replace(references=bool(found.fused) and WANTED[wanted].weights)
    backward = {"backward": plan.backward(found, alignment, wanted=found.computed(wanted))}
    return backward | ({"references": plan.sum_references(found)} if wanted.references else {})


def key_of(row):
    """The budgeted key of a row: the budget does not hold the sum over heads of the gradient of references."""
    return next(iter(launches_of(row).values())).key


def every():
    """All keys; variants and layouts only with the alignment and the sizes that they usually come with."""
    names = list(AXES)
    keys = set()
    for combination in itertools.product(*AXES.values()):
        of = dict(zip(names, combination, strict=True))
        usual = (of["alignment"], of["size"]) == (16, "32 bits")
        simple = (of["variant"], of["layout"]) == ("plain", "contiguous")
        if (usual and of["front"] == "none") or (usual and simple) or (simple and of["front"] == "none"):
            keys.add(key_of(of))
    return sorted(keys | rounding(), key=str)


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


def common():
    """Keys of what models ask for."""
    return {key_of(row) for row in common_rows()}


def rounding_rows():
    return [{"value": dtype} for dtype in ("float16", "bfloat16")]


def rounding():
    return {key_of(row) for row in rounding_rows()}


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


def pairwise():
    """Keys such that any two values of two axes meet in the problem of one of them."""
    return sorted({key_of(row) for row in pairwise_rows()} | rounding(), key=str)


def budgeted_rows():
    """The problems of the budget, as plain data."""
    return [*pairwise_rows(), *common_rows(), *rounding_rows()]


def budgeted():
    """The keys of the budget file."""
    return sorted({*pairwise(), *common()}, key=str)


def _gain(row, axis, value, uncovered):
    pairs = ((axis, value, o, v) if axis < o else (o, v, axis, value) for o, v in enumerate(row) if v is not None)
    return sum(pair in uncovered for pair in pairs)


def flags(key, architecture):
    """NVRTC options of one specialisation: those of kernels.py, and those that CuPy adds."""
    return (*kernels.options(key), f"-arch=sm_{architecture}", "--ptxas-options=-v", "-ftz=true")


def resources(key, architecture):
    """Registers, bytes spilled and warnings of one specialisation; raises RuntimeError where it does not compile."""
    from cupy_backends.cuda.libs import nvrtc

    options, text = flags(key, architecture), kernels.source(key.kind)
    name = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()[:32]
    cached = CACHE / name
    if cached.exists():
        return json.loads(cached.read_text())
    program = nvrtc.createProgram(text, f"msda_{key.kind}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"sm_{architecture} {key}\n{nvrtc.getProgramLog(program)}") from error
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


def compile_all(keys):
    """Resources by (key, architecture), on all cores."""
    tasks = list(itertools.product(keys, ARCHITECTURES))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(tasks, pool.map(_resources, tasks, chunksize=4), strict=True))


def nvrtc_version():
    from cupy_backends.cuda.libs import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def make_budget():
    """What the budget file should say now: registers, bytes spilled, shared memory, in the order of ARCHITECTURES."""
    found = compile_all(budgeted())
    entries = {}
    for (key, architecture), measured in found.items():
        # That of the sort depends on S too: tests/test_plan.py.
        shared = 0 if key.kind in ("round", "sort") else plan.shared_bytes(key)
        entry = entries.setdefault(str(key), {"shared": shared, "registers": [], "spilled": []})
        assert architecture == ARCHITECTURES[len(entry["registers"])]
        entry["registers"].append(measured["registers"])
        entry["spilled"].append(measured["spilled"])
    return {"nvrtc": nvrtc_version(), "architectures": list(ARCHITECTURES), "kernels": entries}


if __name__ == "__main__":
    budget = make_budget()
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in budget["kernels"].items()]
    head = json.dumps({k: budget[k] for k in ("nvrtc", "architectures")}, indent=1)[:-2]
    BUDGET.write_text(head + ',\n "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n")
