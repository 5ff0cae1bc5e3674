"""Versions of JAX, exported functions, XLA's flags, and errors."""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import cupy_msda
from cupy_msda import arrays
from cupy_msda.jax import call_frame, compat, handler, lowering, ms_deform_attn
from tests.helpers import cases
from tests.helpers.jax_calls import SMALL, function_of, inputs_of, output_and_gradients
from tests.helpers.tolerance import assert_close

ROOT = Path(__file__).parent.parent.parent
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (handler.TARGET, handler.ALLOCATING_TARGET)]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.mark.parametrize("version", [(0, 6, 2), (0, 8, 3), (0, 10, 2), (0, 11, 2)])
def test_known_versions_call_the_handlers(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.follows_handlers(version)


@pytest.mark.parametrize("version", [(0, 5, 3), (0, 12, 0), (1, 0, 0)])
def test_an_unknown_version_is_warned_of(version):
    with pytest.warns(RuntimeWarning, match=r"knows JAX from 0\.6 to before 0\.12.*pure_callback"):
        assert not compat.follows_handlers(version)


def test_an_unknown_version_computes_by_callbacks(monkeypatch):
    monkeypatch.setattr(lowering, "_handled", False)
    inputs = inputs_of(SMALL)
    function, given = function_of(inputs, query_lengths=[3, 3])  # compiled by no other test
    output, gradients = output_and_gradients(function, given, inputs.grad_output)
    want_output, want = cases.expected(inputs)
    assert_close(output, want_output, "float32")
    assert_close(gradients["value"], want[0], "float32")
    assert "cupy_msda" not in jax.jit(function).lower(*given.values()).as_text()


def test_the_structs_are_those_of_the_installed_header():
    """Sizes and offsets, as a C compiler would give them, from the header that comes with JAX."""
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    table = header[header.index("struct XLA_FFI_Api {") :]
    names = [line.split("(XLA_FFI_")[1].split(")")[0] for line in table.splitlines() if "(XLA_FFI_" in line]
    names = [name for name in names if name != "Api"]
    ours = [name for name, _ in call_frame._Api._fields_ if "_" in name]
    assert len(names) >= len(ours)
    used = ("Error_Create", "Error_Destroy", "Stream_Get", "DeviceMemory_Allocate", "DeviceMemory_Free",
            "DeviceOrdinal_Get")  # fmt: skip
    assert {name: names.index(name) for name in used} == {name: ours.index(name) for name in used}
    assert call_frame._CallFrame.arguments.offset == 40
    assert call_frame._Buffer.data.offset == 24


def test_an_exported_function_runs_in_another_process(tmp_path):
    pytest.importorskip("flatbuffers")
    inputs = inputs_of(SMALL)
    function, given = function_of(inputs)
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS)(*given.values())
    (tmp_path / "exported").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", *given.values())
    code = (
        "import jax.export, numpy, sys\n{}\n"
        "read = jax.export.deserialize(bytearray(open(sys.argv[1] + '/exported', 'rb').read()))\n"
        "output = read.call(*numpy.load(sys.argv[1] + '/arrays.npz').values())\n"
        "numpy.save(sys.argv[1] + '/output.npy', output)\n"
    )

    def run(first):
        command = [sys.executable, "-c", code.format(first), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    result = run("import cupy_msda.jax")
    assert result.returncode == 0, result.stderr[-2000:]
    assert_close(np.load(tmp_path / "output.npy"), cases.expected(inputs)[0], "float32")
    without = run("")
    assert without.returncode != 0
    assert "cupy_msda" in without.stderr


def test_an_exported_function_with_a_symbolic_number_of_images():
    inputs = inputs_of(SMALL)
    function, given = function_of(inputs)
    (n,) = jax.export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct((n, *array.shape[1:]), array.dtype) for array in given.values()]
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS)(*shapes)
    for count in (1, 2):
        output = exported.call(*(array[:count] for array in given.values()))
        assert_close(np.asarray(output), cases.expected(inputs)[0][:count], "float32")


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops=1 --xla_dump_to=/tmp", True),
        ("--xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
        ("--xla_gpu_exclude_nondeterministic_ops=true", True),
    ],
)
@pytest.mark.parametrize("given", [None, True, False])
def test_determinism_is_that_of_xla_unless_it_is_given(monkeypatch, flags, wanted, given):
    monkeypatch.setenv("XLA_FLAGS", flags)
    inputs = inputs_of(SMALL)
    function, operands = function_of(inputs, deterministic=given)
    (equation,) = (
        equation
        for equation in jax.make_jaxpr(function)(*operands.values()).jaxpr.eqns
        if equation.primitive.name == "ms_deform_attn"
    )
    expected = wanted if given is None else given
    assert equation.params["operation"].deterministic == expected
    assert arrays.framework_of(jnp.zeros(1)).wants_determinism() == wanted


def test_bad_level_sizes_that_jit_traces_are_an_error_of_xla():
    inputs = inputs_of(SMALL)
    function = jax.jit(lambda shapes: ms_deform_attn(inputs.value, shapes, None, inputs.locations, inputs.weights))
    with pytest.raises(Exception, match=r"spatial_shapes: expected level 0 of 12 x 15 pixels .* to fit into S = 26"):
        function(inputs.shapes * 3).block_until_ready()


MISTAKES = {
    "dtype": {"value": np.ones((2, 26, 2, 4), "i4")},
    "wide": {"locations": np.ones((2, 3, 2, 2, 2, 2), "f2")},
    "rank": {"locations": np.ones((2, 3, 2, 2, 2), "f4")},
    "heads": {"weights": np.ones((2, 3, 3, 2, 2), "f4")},
    "levels": {"shapes": [(4, 5), (9, 9)]},
    "no levels": {"shapes": [(4, 5, 6)]},
    "floats": {"shapes": [(4.0, 5.0), (3.0, 2.0)]},
    "a bool": {"shapes": [(4, 5), (True, 2)]},
    "a bool length": {"query_lengths": [True, 3]},
    "lengths": {"query_lengths": [1, 4]},
    "points": {"num_points": [1]},
    "padding": {"padding_mode": "reflection"},
    "step": {"im2col_step": 0},
    "flag": {"deterministic": 1},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_those_of_the_array_functions(mistake):
    inputs = inputs_of(SMALL)
    given = {"value": inputs.value, "shapes": inputs.shapes, "locations": inputs.locations, "weights": inputs.weights}
    options = {name: value for name, value in MISTAKES[mistake].items() if name not in given}
    given |= {name: value for name, value in MISTAKES[mistake].items() if name in given}
    messages = []
    for function in (cupy_msda.ms_deform_attn, ms_deform_attn):
        with pytest.raises((TypeError, ValueError)) as error:
            function(given["value"], given["shapes"], None, given["locations"], given["weights"], **options)
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]


def test_other_arrays_are_refused():
    inputs = inputs_of(SMALL)
    with pytest.raises(TypeError, match="value: expected an array of JAX or NumPy, got list"):
        ms_deform_attn(inputs.value.tolist(), inputs.shapes, None, inputs.locations, inputs.weights)


def test_a_process_ends_while_jax_still_computes():
    """A handler that is called while Python ends would wait forever."""
    code = (
        "import jax, numpy as np\nfrom cupy_msda.jax import ms_deform_attn\n"
        "value, samples = np.ones((2, 400, 4, 16), 'f4'), np.full((2, 2000, 4, 1, 4, 2), 0.5, 'f4')\n"
        "function = jax.jit(lambda value: ms_deform_attn(value, [(20, 20)], None, samples, samples[..., 0]))\n"
        "for _ in range(4): function(value)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
