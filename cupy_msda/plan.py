"""Which kernel runs, and how it is launched: a pure function of the problem, no framework, no GPU.

A :class:`KernelKey` spells every compile-time choice; :class:`Launch` adds what varies from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .interop import item_size
from .problem import SIXTEEN_BIT, Problem

VECTOR_BYTES = 16
THREADS = 256
# Shared memory of a block: stays below the 48 KB that need no opt-in, and leaves most of the SM to L1.
SHARED_BUDGET = 40 * 1024
# Rows of the patch of pixels that shares a block where queries are pixels.
BAND = 8
# More levels than this and the kernel's parameters would not hold them: they go to the device.
MAX_LEVELS_BY_VALUE = 64
# A head of very many channels: the turns alone keep enough loads in flight, and its sums need the registers.
_MANY_TURNS = {"min_blocks": 1, "unroll": 1}


@dataclass(frozen=True)
class KernelKey:
    """Every axis along which the kernels are specialised. `kind` is the name of the .cu file and the kernel."""

    kind: str
    value_dtype: str
    location_dtype: str
    index_64: bool
    L: int
    P: int
    M: int
    D: int
    vec: int
    lanes: int
    queries: int
    chunk: int
    threads: int
    min_blocks: int
    unroll: int
    band: int
    levels_on_device: bool
    grad_value: bool = False
    grad_samples: bool = False

    def macros(self) -> dict[str, int]:
        """Preprocessor definitions, without dtypes, that the sources document."""
        skip = ("kind", "value_dtype", "location_dtype")
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        return {f"MSDA_{name.upper()}": int(number) for name, number in named.items()}

    def __str__(self) -> str:
        axes = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "kind"]
        return f"{self.kind}[{', '.join(axes)}]"


@dataclass(frozen=True)
class Launch:
    """A kernel and its launch: blocks, threads a block, bytes of dynamic shared memory."""

    key: KernelKey
    grid: int
    block: int
    shared: int


def forward(problem: Problem, alignment: int) -> Launch:
    """Launch of the forward kernel; `alignment` is the bytes that all value-like addresses are multiples of."""
    itemsize = item_size(problem.value_dtype)
    vec = _vector(problem.D, itemsize, min(alignment, VECTOR_BYTES))
    pieces = problem.D // vec
    turns = -(-pieces // 32)
    lanes = -(-pieces // turns)
    return _launch(problem, "forward", vec, lanes, **({"min_blocks": 4, "unroll": 4} if turns <= 4 else _MANY_TURNS))


def backward(problem: Problem, alignment: int, *, grad_value: bool = True, grad_samples: bool = True) -> Launch:
    """Launch of the backward kernel, for the gradients that are wanted.

    A lane owns 16 bytes of the float32 or float64 gradient: with 32 bytes a lane, in two vector reductions,
    the reductions ran at half the rate (H100, float16).
    """
    itemsize = item_size(problem.value_dtype)
    widest = VECTOR_BYTES // item_size(problem.accumulator_dtype) * itemsize
    vec = _vector(problem.D, itemsize, min(alignment, widest))
    pieces = problem.D // vec
    turns = -(-pieces // 32)
    lanes = 1 << (-(-pieces // turns) - 1).bit_length()  # the shuffles need a power of two
    choices = {"min_blocks": 3, "unroll": 2} if turns <= 4 else _MANY_TURNS
    return _launch(problem, "backward", vec, lanes, grad_value=grad_value, grad_samples=grad_samples, **choices)


def _vector(D: int, itemsize: int, width: int) -> int:
    vec = max(1, width // itemsize)
    while D % vec:
        vec //= 2
    return vec


def _launch(problem: Problem, kind: str, vec: int, lanes: int, **choices: int) -> Launch:
    K = problem.L * problem.P
    index_64 = problem.S * problem.M * problem.D >= 2**31
    entry = 4 * (8 if index_64 else 4) + 4 * item_size(problem.accumulator_dtype)
    queries = THREADS // lanes
    # Few lanes mean many queries and a large table: first fewer queries, then a part of the samples at a time.
    while queries * lanes > 64 and queries * (K | 1) * entry > SHARED_BUDGET:
        queries //= 2
    most = SHARED_BUDGET // (queries * entry) - 1
    chunk = -(-K // -(-K // max(1, most)))
    threads = -(-queries * lanes // 32) * 32
    by_value = problem.levels is not None and problem.L <= MAX_LEVELS_BY_VALUE
    key = KernelKey(
        kind,
        problem.value_dtype,
        problem.location_dtype,
        index_64,
        problem.L,
        problem.P,
        problem.M,
        problem.D,
        vec,
        lanes,
        queries,
        chunk,
        threads,
        band=BAND if problem.Q == problem.S and problem.Q < 2**31 else 0,
        levels_on_device=not by_value,
        **choices,
    )
    tiles = problem.N * problem.M * -(-problem.Q // queries)
    return Launch(key, min(tiles, 2**31 - 1), threads, shared_bytes(key))


def shared_bytes(key: KernelKey) -> int:
    """Size of the kernels' `msda_table`."""
    accumulator = 8 if key.value_dtype == "float64" else 4
    index = 8 if key.index_64 else 4
    slots = key.queries * (key.chunk | 1)
    size = slots * 4 * (index + accumulator) + key.L * (index + 8)
    size = -(-size // 8) * 8 + key.queries * 8
    return -(-size // 16) * 16


def round_gradient(value_dtype: str, count: int) -> Launch:
    """Launch of the kernel that rounds a float32 gradient of `count` elements to a 16-bit dtype."""
    assert value_dtype in SIXTEEN_BIT
    key = KernelKey("round", value_dtype, "float32", False, 1, 1, 1, 1, 1, 1, 1, 1, THREADS, 1, 1, 0, False)
    return Launch(key, max(1, min(-(-count // (4 * THREADS)), 1 << 16)), THREADS, 0)
