"""The compiled tier of the CPU path: when it runs, its blocks and threads, what it copies. The contract's tests and the
drawn calls hold its results against the formula and against NumPy's.
"""

import builtins
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_msda
from cupy_msda.call import Wanted
from cupy_msda.cpu import run as cpu_run
from cupy_msda.cpu import tier
from cupy_msda.cpu.sampling import from_accumulator
from tests.helpers.backends import NumPyBackend
from tests.helpers.calls import call_of
from tests.helpers.cases import DTYPE_PAIRS, VARIANTS, Case, to_fused
from tests.helpers.checks import run_fused, run_operator

pytest.importorskip("numba")
from cupy_msda.cpu.compiled import build, casts, kernels, run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _numba_tier(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numba")


def test_it_runs_by_itself_where_numba_is_installed(monkeypatch):
    monkeypatch.delenv("CUPY_MSDA_CPU")
    assert tier.compiled_tier() is run
    assert tier.describe() == "numba"


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_setting_is_none(monkeypatch, empty):
    monkeypatch.setenv("CUPY_MSDA_CPU", empty)
    assert tier.compiled_tier() is run
    assert tier.describe() == "numba"


def test_the_setting_takes_numpy(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "numpy")
    assert tier.compiled_tier() is None
    assert tier.describe() == "NumPy (CUPY_MSDA_CPU=numpy)"


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("CUPY_MSDA_CPU", "fast")
    with pytest.raises(ValueError, match="CUPY_MSDA_CPU: expected 'numpy' or 'numba', got 'fast'"):
        run_operator(NumPyBackend(), Case("").inputs())


@pytest.fixture
def _numba_fails(monkeypatch):
    """A numba that does not know this NumPy."""
    imported = builtins.__import__

    def without_numba(name, *arguments, **named):
        if name == "numba" or name.startswith("numba."):
            raise ImportError("Numba needs NumPy 2.4 or less")
        return imported(name, *arguments, **named)

    for name in [name for name in sys.modules if name.startswith("cupy_msda.cpu.compiled")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_numba)
    tier._load.cache_clear()
    yield
    tier._load.cache_clear()


@pytest.mark.usefixtures("_numba_fails")
def test_numpy_runs_where_numba_cannot_be_imported(monkeypatch):
    monkeypatch.delenv("CUPY_MSDA_CPU")
    assert tier.compiled_tier() is None
    assert "Numba needs NumPy 2.4 or less" in tier.describe()
    monkeypatch.setenv("CUPY_MSDA_CPU", "numba")
    with pytest.raises(RuntimeError, match=r"CUPY_MSDA_CPU: numba cannot be used.*pip install 'numba>=0.61'"):
        tier.compiled_tier()


def test_float16_and_bfloat16_are_read_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, np.float32)
    _fill(bits.view(np.int16), wide)
    np.testing.assert_array_equal(wide, bits.view(np.float16).astype(np.float32))
    _fill(bits, wide)
    np.testing.assert_array_equal(wide.view(np.uint32) >> 16, bits)


def _numbers_to_cast():
    """All numbers of both dtypes, the middles between neighbours, what is next to these, and others at random."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    exact = np.concatenate((bits.view(np.float16).astype(np.float32).view(np.uint32), bits.astype(np.uint32) << 16))
    middles = np.concatenate((exact + 0x1000, exact + 0x8000, exact + 0x2000))
    drawn = np.random.default_rng(0).integers(1 << 32, size=1 << 17, dtype=np.uint32)
    return np.concatenate((exact, middles - 1, middles, middles + 1, drawn)).view(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_to_16_bits_round_as_numpy_does(dtype):
    numbers = _numbers_to_cast()
    storage = np.dtype("float16" if dtype == "float16" else "uint16")
    with np.errstate(over="ignore"):
        have, want = casts.narrowed(numbers, storage, dtype), from_accumulator(numbers, storage, dtype)
    is_nan = np.isnan(numbers)
    np.testing.assert_array_equal(have[~is_nan].view(np.uint16), want[~is_nan].view(np.uint16))
    assert np.isnan(casts.widened(have[is_nan], np.dtype("float32"))).all()


@kernels._function
def _fill(bits, found):
    for i in range(bits.size):
        found[i] = kernels.widen(bits[i])


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", [Case("plain", N=3, M=3, queries=40), *VARIANTS[:4]], ids=str)
def test_results_depend_on_neither_blocks_nor_threads(monkeypatch, pair, case):
    inputs = case.inputs(*pair, seed=3)
    settings = [(1, 1 << 15, 1 << 12), (1, 1, 1), (2, 1, 1), (3, 40, 7), (7, 1 << 15, 1)]
    monkeypatch.setattr(run, "ONE_TASK_SAMPLES", 0)
    found = []
    for threads, block, others in settings:
        monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", str(threads))
        monkeypatch.setattr(run, "BLOCK_SAMPLES", block)
        monkeypatch.setattr(run, "ONE_BLOCK_SAMPLES", others)
        monkeypatch.setattr(run, "TASK_SAMPLES", others)
        output, grads = run_operator(NumPyBackend(), inputs, **case.variant)
        found.append([output, *grads])
    for one in found[1:]:
        for have, want in zip(one, found[0], strict=True):
            assert have.tobytes() == want.tobytes()


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradients_of_reference_points_depend_on_no_thread(monkeypatch, coordinates):
    """They are sums over heads, which several threads work on."""
    inputs = to_fused(Case("fused", N=2, M=4, queries=300).inputs(), coordinates=coordinates)
    monkeypatch.setattr(run, "TASK_SAMPLES", 1)
    monkeypatch.setattr(run, "ONE_TASK_SAMPLES", 0)
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CUPY_MSDA_NUM_THREADS", threads)
        found.append(run_fused(NumPyBackend(), inputs)[1])
    for one in found[1:]:
        for have, want in zip(one, found[0], strict=True):
            assert have.tobytes() == want.tobytes()


def test_a_forward_of_one_image_and_head_is_several_blocks():
    problem = call_of(*Case("long", N=1, M=1, queries=9000, P=4).inputs()[:6]).problem
    blocks = list(run._forward_blocks(problem, None))
    assert len(blocks) >= run.BLOCKS
    assert [query for block in blocks for query in range(9000)[block.queries]] == list(range(9000))


@pytest.mark.parametrize(("Q", "count"), [(511, 1), (512, 1), (513, 2)])
def test_a_small_forward_is_one_block(Q, count):
    problem = call_of(*Case("small", N=1, M=4, queries=Q, P=2).inputs()[:6]).problem
    assert run.ONE_BLOCK_SAMPLES == 512 * problem.M * problem.K
    assert len(list(run._forward_blocks(problem, None))) == count


LAYOUTS = {
    "channels apart": lambda value: np.asfortranarray(value),
    "backwards": lambda value: value[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    "every other head": lambda value: np.repeat(value, 2, axis=2)[:, :, ::2],
    "one image for all": lambda value: np.broadcast_to(value[:1], value.shape),
    "read-only": lambda value: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape),
    "not aligned": lambda value: np.frombuffer(b"x" + value.tobytes(), value.dtype, offset=1).reshape(value.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_layout_gives_the_bits_of_a_contiguous_one(layout, dtype):
    inputs = Case("layouts", N=2, M=3, queries=9).inputs(dtype)
    changed = inputs._replace(**{
        name: LAYOUTS[layout](getattr(inputs, name)) for name in ("value", "locations", "weights")
    })  # fmt: skip
    contiguous = changed._replace(**{
        name: np.ascontiguousarray(getattr(changed, name)).copy() for name in ("value", "locations", "weights")
    })  # fmt: skip
    for have, want in zip(_all_of(changed), _all_of(contiguous), strict=True):
        assert have.tobytes() == want.tobytes()


def _all_of(inputs):
    output = cupy_msda.ms_deform_attn(*inputs[:5])
    return [output, *cupy_msda.ms_deform_attn_backward(*inputs, 64)]


def test_it_compiles_where_no_folder_can_be_written(monkeypatch):
    def refuse(*arguments, **named):
        raise OSError("No space left on device")

    monkeypatch.setattr("numba.core.caching.FunctionCache.save_overload", refuse)
    monkeypatch.setattr("numba.core.caching.FunctionCache.load_overload", lambda *arguments: None)
    kernel = build.materialise.__wrapped__("float64")
    offsets, logits = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1, 1))
    locations, weights = np.full((1, 1, 1, 2), np.nan), np.full((1, 1, 1, 1), np.nan)
    kernel(np.full((1, 1, 1, 2), 0.5), offsets, logits, np.array([[2, 3, 0, 1]]), locations, weights)
    assert (locations.tolist(), weights.tolist()) == ([[[[0.5, 0.5]]]], [[[[1.0]]]])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_gradient_has_the_bits_that_it_has_among_all(dtype, fused):
    inputs = Case("one gradient", N=2, M=2, queries=60).inputs(dtype, dtype)
    inputs = to_fused(inputs, coordinates=4) if fused else inputs
    call = call_of(*inputs, wanted=Wanted(references=fused))
    every = run.backward(cpu_run._inputs(call), Wanted(references=fused))
    for name in ("value", "locations", "weights"):
        found = run.backward(cpu_run._inputs(call), Wanted(*(one == name for one in Wanted._fields)))
        assert [one for one, gradient in found._asdict().items() if gradient is not None] == [name]
        assert getattr(found, name).tobytes() == getattr(every, name).tobytes()


@pytest.mark.parametrize(
    ("name", "dtype"), [("forward", "bfloat16"), ("backward", "float32"), ("materialise", "float32")]
)
def test_loops_over_samples_call_no_function_of_ours(name, dtype, monkeypatch):
    """A call with arrays as arguments costs more than a sample."""
    monkeypatch.setattr("numba.core.caching.FunctionCache.save_overload", lambda *arguments: None)
    monkeypatch.setattr("numba.core.caching.FunctionCache.load_overload", lambda *arguments: None)
    (code,) = getattr(build, name).__wrapped__(dtype).inspect_llvm().values()
    body = code[code.index("\ndefine ") :].partition("\n}")[0]
    called = set(re.findall(r"call [^@\n]*@\"?([^(\"]+)", body))
    assert called
    assert not [function for function in called if "cupy_msda" in function]


def test_importing_the_package_imports_no_numba():
    code = "import cupy_msda, sys; print('numba' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
