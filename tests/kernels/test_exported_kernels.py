"""Exported forwards in C: what they compile to, and that they launch what the package launches, without a GPU."""

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import FusedFrontEnd, Problem, Variant, contiguous_starts
from cupy_msda.cuda import plan
from cupy_msda.cuda.forward_export import export_forward
from cupy_msda.cuda.gpu import H100
from tests.helpers import cases, emulated_gpu, emulator, exported_launcher
from tests.helpers.exported_launcher import Launcher
from tests.helpers.tolerance import assert_close

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
pytestmark = pytest.mark.skipif(exported_launcher.COMPILER is None, reason="needs a C compiler")

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))
NULL, UNUSED, MISALIGNED, NEGATIVE, NOT_PIXELS, TOO_LARGE, NO_CUBIN = range(-1, -8, -1)


def problem(levels=LEVELS, N=2, Q=None, dtypes=("float32", "float32"), P=4, **options):
    S, L = sum(h * w for h, w in levels), len(levels)
    table = tuple((h, w, start) for (h, w), start in zip(levels, contiguous_starts(levels), strict=True))
    return Problem(N, S, 8, 32, L, P, S if Q is None else Q, *dtypes, ("cuda", 0), table, **options)


PROBLEMS = {
    "encoder": problem(),
    "encoder_16_bits": problem(dtypes=("float16", "float32")),
    "decoder": problem(Q=300),
    "many_images": problem(N=40, Q=300, dtypes=("bfloat16", "bfloat16")),
    "float64": problem(Q=300, dtypes=("float64", "float64")),
    "border": problem(Q=300, variant=Variant(padding_mode="border")),
    "ragged": problem(Q=300, ragged=True),
    "packed": problem(
        Q=300, levels=LEVELS[:3], P=0, variant=Variant((3, 6, 3)), fused=FusedFrontEnd(4, 1, "float32", True)
    ),
    "boxes": problem(Q=300, dtypes=("float16", "float16"), fused=FusedFrontEnd(4, 4, "float16", False)),
    "many_levels": problem(Q=300, levels=((2, 3),) * 3500, P=1),
}


@pytest.fixture(scope="module")
def exports():
    return {name: export_forward(name, one, [80, 90]) for name, one in PROBLEMS.items()}


@pytest.fixture(scope="module")
def launcher(exports, tmp_path_factory):
    return Launcher(list(exports.values()), tmp_path_factory.mktemp("exported"), H100)


def arguments_of(export, **changes):
    """Arguments of a call with addresses that are never read."""
    of = export.problem
    present = {
        "weights": not of.packed, "references": of.fused is not None, "query_lengths": of.ragged,
        "level_start_index": False,
    }  # fmt: skip
    names = exported_launcher.Arguments.ADDRESSES
    found = {name: 4096 * number for number, name in enumerate(names, 1) if present.get(name, True)}
    return found | {"N": of.N, "S": of.S, "Q": of.Q} | changes


def launched(launcher, export, **changes):
    """The launch of a call that succeeds."""
    del launcher.launches[:]
    assert launcher.forward(launcher.load(export), **arguments_of(export, **changes)) == 0
    (launch,) = launcher.launches
    return launch


@pytest.mark.parametrize("name", PROBLEMS)
def test_grid_threads_and_shared_memory_are_the_planner_s(launcher, exports, name):
    export = exports[name]
    want, have = plan.forward(export.problem, 16, H100), launched(launcher, export)
    assert (have.grid, have.threads, have.shared_bytes) == (want.grid, want.threads, want.shared_bytes)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("N", [1, 3, 700])
@pytest.mark.parametrize("Q", [1, 3, 299, 5000])
def test_other_sizes_get_the_planner_s_grid(launcher, exports, name, N, Q):
    export = exports[name]
    S = Q if export.pixel_queries else export.problem.S
    other = replace(export.problem, N=N, S=S, Q=Q, levels=None)
    spec = next(cubin.spec for cubin in export.cubins if cubin.architecture == 90)
    assert launched(launcher, export, N=N, S=S, Q=Q).grid == plan.launch_of(other, spec, H100).grid


@pytest.mark.parametrize("multiprocessors", [20, 66, 78, 144])
def test_the_last_wave_follows_the_device(launcher, exports, multiprocessors):
    export = exports["encoder"]
    launcher.set("multiprocessors", multiprocessors)
    try:
        for pixels in (2000, 5000, 16000):
            other = replace(export.problem, S=pixels, Q=pixels, levels=None)
            gpu = replace(H100, multiprocessors=multiprocessors)
            want = plan.launch_of(other, export.cubins[1].spec, gpu)
            assert launched(launcher, export, S=pixels, Q=pixels).grid == want.grid
    finally:
        launcher.set("multiprocessors", H100.multiprocessors)


def test_the_words_are_addresses_and_sizes(launcher, exports):
    export = exports["ragged"]
    given = arguments_of(export, level_start_index=2**20)
    have = launched(launcher, export, level_start_index=2**20)
    names = [name for name in exported_launcher.Arguments.ADDRESSES if name != "query_lengths"]
    addresses = [given.get(name, 0) for name in names]
    assert have.words == (*addresses[:6], given["query_lengths"], addresses[6], *plan.size_words(export.problem))


def test_a_stream_reaches_the_driver(launcher, exports):
    export = exports["decoder"]
    assert launcher.forward(launcher.load(export), stream=77, **arguments_of(export)) == 0
    assert launcher.launches[-1].stream == 77


@pytest.mark.parametrize("name", ["decoder", "many_levels"])
def test_attributes_are_those_that_the_package_sets(launcher, exports, name):
    export = exports[name]
    launcher.load(export)
    shared = export.cubins[1].spec.shared_bytes
    assert launcher.attributes[9] == H100.carveout(export.cubins[1].resident_blocks, shared)
    if shared > 48 * 1024:
        assert launcher.attributes[8] == shared
    assert (shared > 48 * 1024) == (name == "many_levels")


@pytest.mark.parametrize(
    ("capability", "chosen"), [((8, 0), 80), ((8, 6), 80), ((9, 0), 90), ((7, 5), None), ((10, 0), None)]
)
def test_a_cubin_is_for_its_major_capability(launcher, exports, capability, chosen):
    for name, number in zip(("major", "minor"), capability, strict=True):
        launcher.set(name, number)
    try:
        export = exports["decoder"]
        kernel = launcher.load(export, expected=0 if chosen else NO_CUBIN)
        if chosen:
            rows = [cubin.architecture for cubin in export.cubins]
            cubins = exported_launcher.ctypes.c_int * 2
            assert tuple(cubins.from_address(kernel.cubin)) == divmod(rows[rows.index(chosen)], 10)
    finally:
        launcher.set("major", 9)
        launcher.set("minor", 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "chosen"),
    [
        ([80, 86, 87], (8, 9), 86),
        ([80, 86, 87], (8, 7), 87),
        ([87], (8, 9), None),
        ([87], (8, 7), 87),
        ([80, 86], (8, 7), None),
        ([86, 80], (8, 9), 86),
        ([86], (8, 0), None),
        ([75], (7, 2), None),
        ([100], (10, 3), 100),
        ([100], (10, 1), None),
        ([100], (11, 0), None),
        ([120], (12, 1), 120),
    ],
)
def test_tegra_and_other_gpus_run_no_cubins_of_each_other(of_architectures, architectures, capability, chosen):
    """CUDA C++ Programming Guide, "Binary Compatibility": none for Tegra, and none between desktop and Tegra."""
    launcher, named = of_architectures
    for name, number in zip(("major", "minor"), capability, strict=True):
        launcher.set(name, number)
    kernel = launcher.load(named["_".join(map(str, architectures))], expected=0 if chosen else NO_CUBIN)
    if chosen:
        cubin = (exported_launcher.ctypes.c_int * 2).from_address(kernel.cubin)
        assert tuple(cubin) == divmod(chosen, 10)


@pytest.fixture(scope="module")
def of_architectures(exports, tmp_path_factory):
    """The launcher of exports whose cubins say that they are for these architectures, and the exports by name."""
    cubin, named = exports["decoder"].cubins[0], {}
    for architectures in ([80, 86, 87], [87], [80, 86], [86, 80], [86], [75], [100], [120]):
        name = "_".join(map(str, architectures))
        cubins = tuple(replace(cubin, architecture=architecture) for architecture in architectures)
        named[name] = replace(exports["decoder"], name=f"for_{name}", cubins=cubins)
    return Launcher(list(named.values()), tmp_path_factory.mktemp("architectures"), H100), named


def test_a_driver_s_error_is_returned(launcher, exports):
    launcher.set("load_status", 209)
    try:
        launcher.load(exports["decoder"], expected=209)
    finally:
        launcher.set("load_status", 0)


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        ("decoder", {"value": 0}, NULL),
        ("decoder", {"output": None}, NULL),
        ("decoder", {"weights": None}, NULL),
        ("decoder", {"spatial_shapes": None}, NULL),
        ("boxes", {"references": None}, NULL),
        ("ragged", {"query_lengths": None}, NULL),
        ("decoder", {"query_lengths": 4096}, UNUSED),
        ("decoder", {"references": 4096}, UNUSED),
        ("packed", {"weights": 4096}, UNUSED),
        ("decoder", {"value": 4104}, MISALIGNED),
        ("decoder", {"locations": 4104}, MISALIGNED),
        ("decoder", {"spatial_shapes": 4100}, MISALIGNED),
        ("decoder", {"Q": -1}, NEGATIVE),
        ("encoder", {"Q": 300}, NOT_PIXELS),
        ("encoder", {"Q": 2**21 + 1, "S": 2**21 + 1}, TOO_LARGE),
        ("decoder", {"Q": 2**23}, TOO_LARGE),
        ("decoder", {"S": 2**26}, TOO_LARGE),
        ("decoder", {"N": 2**29}, TOO_LARGE),
        ("encoder", {"N": 9000}, TOO_LARGE),
    ],
)
def test_wrong_arguments_are_refused(launcher, exports, name, changes, status):
    export = exports[name]
    del launcher.launches[:]
    assert launcher.forward(launcher.load(export), **arguments_of(export, **changes)) == status
    assert not launcher.launches


@pytest.mark.parametrize("changes", [{"Q": 2**23 - 1}, {"S": 2**26 - 1}])
def test_the_largest_sizes_are_taken(launcher, exports, changes):
    spec = exports["decoder"].cubins[1].spec
    largest = replace(PROBLEMS["decoder"], levels=None, N=1, **changes)
    assert launched(launcher, exports["decoder"], N=1, **changes).grid == plan.launch_of(largest, spec, H100).grid
    ((key, size),) = changes.items()
    with pytest.raises(NotImplementedError):
        plan.launch_of(replace(largest, **{key: size + 1}), spec, H100)


def test_nothing_is_launched_for_nothing(launcher, exports):
    kernel = launcher.load(exports["decoder"])
    del launcher.launches[:]
    for empty in ({"N": 0}, {"Q": 0}):
        assert launcher.forward(kernel, **arguments_of(exports["decoder"], **empty)) == 0
    assert not launcher.launches


def test_without_pixels_the_output_is_zeros(launcher, exports):
    output = np.full(4 + 2 * 3 * 256, 7, np.float32)
    first = -output.ctypes.data // 4 % 4  # a multiple of 16 bytes
    kernel = launcher.load(exports["decoder"])
    arguments = arguments_of(exports["decoder"], N=2, S=0, Q=3, output=output[first:].ctypes.data)
    assert launcher.forward(kernel, **arguments) == 0
    assert not output[first : first + 1536].any()
    assert (output[first + 1536 :] == 7).all()


def test_unloading_unloads_the_module(launcher, exports):
    kernel, before = launcher.load(exports["decoder"]), launcher.get("unloaded").value
    assert launcher.library.cupy_msda_unload(exported_launcher.ctypes.byref(kernel)) == 0
    assert launcher.get("unloaded").value == before + 1


def test_the_objects_need_libcuda_alone(exports, tmp_path):
    exported_launcher.c_sources.write([exports["decoder"]], tmp_path)
    objects = exported_launcher.compile_objects(tmp_path)
    listed = subprocess.run(["nm", "-u", *objects], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[1] for line in listed.splitlines() if " U " in line}
    of_others = {name for name in undefined if not name.startswith(("cu", "cupy_msda_"))}
    assert of_others <= {"_GLOBAL_OFFSET_TABLE_"}
    assert "cuLaunchKernel" in undefined


def test_a_program_without_python_runs(exports, tmp_path):
    """With the stub, whose launch writes nothing: the arguments are read, and checked by the launcher."""
    exported_launcher.c_sources.write([exports["decoder"]], tmp_path)
    program = exported_launcher.compile_program(tmp_path, "cupy_msda_decoder", exported_launcher.STUB)
    arrays = {"value": np.ones((1, 6, 8, 32), "f4"), "spatial_shapes": np.array([[2, 3]])}
    arrays |= {"locations": np.ones(32, "f4"), "weights": np.ones(16, "f4")}
    output = exported_launcher.run_program(program, tmp_path, arrays, (1, 6, 1), np.empty((1, 1, 256), "f4"))
    assert not output.any()
    (tmp_path / "weights.bin").unlink()
    done = subprocess.run([program, tmp_path, "1", "6", "1", "1024"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"cupy_msda_forward: status {NULL}\n")


def test_a_program_in_cplusplus_reads_the_headers(exports, tmp_path):
    exported_launcher.c_sources.write([exports["decoder"]], tmp_path)
    compiler = emulator.COMPILER
    if compiler is None:
        pytest.skip("needs g++")
    program = '#include "cupy_msda_kernels.h"\nint main() { return cupy_msda_decoder.cubin_count != 2; }\n'
    (tmp_path / "program.cpp").write_text(program)
    command = [compiler, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "program.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)


def test_the_image_is_the_cubin_of_the_kernel(launcher, exports, tmp_path):
    export = exports["decoder"]
    launcher.load(export)
    address = exported_launcher.ctypes.c_void_p.in_dll(launcher.library, "stub_image").value
    image = export.cubins[1].image
    assert exported_launcher.ctypes.string_at(address, len(image)) == image
    assert image.startswith(b"\x7fELF")
    assert b"msda_forward" in image
    assert address % 8 == 0


# ---- against the package's own calls ---------------------------------------------------------------------------------

CALLS = {
    "plain": (cases.Case("plain", M=3), {}),
    "pixels": (cases.Case("pixels", levels=((6, 7), (3, 4)), queries=None, M=4), {}),
    "points": (cases.Case("points", M=3), {"coordinates": 2}),
    "packed boxes": (cases.Case("boxes", M=3), {"coordinates": 4, "levels": 1, "packed": True}),
}


@pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_launches_what_the_package_launches_and_computes_it(monkeypatch, tmp_path, name):
    case, fused = CALLS[name]
    inputs = cases.to_fused(case.inputs(), **fused) if fused else case.inputs()
    launches = []
    with monkeypatch.context() as patched:
        gpu = emulated_gpu.install(patched)
        arrays = {field: gpu.put(part) for field, part in inputs._asdict().items() if isinstance(part, np.ndarray)}
        middle = [arrays["references"]] if fused else []
        function = cupy_msda.ms_deform_attn_fused if fused else cupy_msda.ms_deform_attn
        shapes, weights = arrays["shapes"], arrays.get("weights")
        want = function(arrays["value"], shapes, None, *middle, arrays["locations"], weights)
        (of_package,) = gpu.launches
    problem = problem_of(inputs, fused)
    export = export_forward("call", problem, [90])
    assert export.cubins[0].spec == of_package.spec

    def run(launch):
        launches.append(launch)
        planned = SimpleNamespace(spec=export.cubins[0].spec, **launch._asdict())
        emulator.run(planned, launch.words)

    launcher = Launcher([export], tmp_path, H100, run)
    output = np.full_like(want.get(), np.nan)
    aligned = gpu.put(output)
    words = of_package.words
    given = dict(zip(exported_launcher.Arguments.ADDRESSES, (*words[:6], words[6], words[7]), strict=True))
    if problem.packed:
        given["weights"] = None
    status = launcher.forward(
        launcher.load(export), N=problem.N, S=problem.S, Q=problem.Q, **given | {"output": aligned.data.ptr}
    )
    assert status == 0
    (have,) = launches
    assert have.words == (*words[:7], aligned.data.ptr, *words[8:])
    assert (have.grid, have.threads, have.shared_bytes) == of_package[1:4]
    assert_close(aligned.host, want.host, "float32")


def problem_of(inputs, fused):
    N, S, M, D = inputs.value.shape
    L, Q = len(inputs.shapes), inputs.locations.shape[1]
    K = inputs.locations[0, 0, 0].size // (3 if fused.get("packed") else 2)
    front = None
    if fused:
        front = FusedFrontEnd(fused["coordinates"], fused.get("levels", L), "float32", fused.get("packed", False))
    return Problem(N, S, M, D, L, K // L, Q, "float32", "float32", ("cuda", 0), None, fused=front)
