"""One random call per seed: sizes, dtypes, variant, numbers, layouts and metadata, all drawn together."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from tests.helpers.cases import DTYPE_PAIRS

from .numbers import draw_arrays

PLAIN_NAMES = ("value", "locations", "weights")
FUSED_NAMES = (*PLAIN_NAMES, "references")
METADATA_FORMS = (
    "list", "list", "tuple", "tensor", "tensor", "array", "array:int32", "array:uint8", "array:uint64", "array:strided",
    "tensor:int32", "tensor:uint8", "tensor:strided",
)  # fmt: skip
LAYOUTS = ("transposed", "sliced", "interleaved", "offset", "expanded", "reversed", "negated")
# Samples of a large call of 32 channels, which the float64 reference takes in a few GiB.
SAMPLES = 120_000
STYLES = (*("finite",) * 8, *("kinks",) * 3, "outside", "huge", "not finite", "not finite", "hostile")
VARIANTS = (
    ("bilinear", "zeros", False), ("bilinear", "zeros", False), ("bilinear", "border", False),
    ("bilinear", "zeros", True), ("bilinear", "border", True), ("nearest", "zeros", False),
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel: dtypes, heads, channels, points and the variant.

    `per_level`: the points are passed as `num_points`. `coordinates` is 0 in a plain call. `reference_levels` is the
    number of reference points per query. `dtypes` are those of value, of locations or offsets, and of the references.
    """

    M: int
    D: int
    points: tuple[int, ...]
    per_level: bool
    dtypes: tuple[str, str, str]
    interpolation: str = "bilinear"
    padding_mode: str = "zeros"
    align_corners: bool = False
    coordinates: int = 0
    reference_levels: int = 0
    packed: bool = False
    ragged: bool = False

    @property
    def fused(self) -> bool:
        return self.coordinates > 0

    @property
    def level_of_samples(self) -> np.ndarray:
        """The level of each sample [K]."""
        return np.repeat(np.arange(len(self.points)), np.array(self.points, np.intp))

    @property
    def points_of_samples(self) -> np.ndarray:
        """The number of points of the level of each sample [K]."""
        return np.array(self.points, np.intp)[self.level_of_samples]

    @property
    def names(self) -> tuple[str, ...]:
        """The differentiable inputs."""
        return FUSED_NAMES if self.fused else PLAIN_NAMES

    @property
    def variant(self) -> dict:
        """The keywords of the variant, without `num_points`."""
        names = ("interpolation", "padding_mode", "align_corners")
        return {name: getattr(self, name) for name in names}

    def dtype_of(self, name: str) -> str:
        of_value, of_samples, of_references = self.dtypes
        of_samples = {"references": of_references}.get(name, of_samples)
        return of_value if name in ("value", "grad_output", "output") else of_samples


@dataclass(frozen=True)
class Case:
    """A call with its arrays, in forms that do not depend on how they are passed.

    value [N, S, M, D], grad_output [N, Q, M, D], locations or offsets [N, Q, M, K, 2], weights or logits [N, Q, M, K],
    references [N, Q, 1 or L, 2 or 4]. `layouts` and `forms` say how arrays and metadata are passed. `wanted` are the
    inputs that require a gradient in torch. `invalid` names what is wrong with the call, if anything.
    """

    seed: int
    form: Form
    levels: tuple[tuple[int, int], ...]
    starts: tuple[int, ...] | None
    lengths: tuple[int, ...] | None
    arrays: dict[str, np.ndarray]
    layouts: dict[str, str]
    forms: dict[str, str]
    wanted: tuple[str, ...]
    deterministic: bool | None = None
    im2col_step: int = 64
    framework: str = "numpy"
    registered: str = "direct"
    changes: str | None = None
    small_blocks: bool = False
    style: str = "finite"
    invalid: str | None = None
    on_device: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        N, S, M, D = self.arrays["value"].shape
        points = self.form.points
        return {"N": N, "S": S, "M": M, "D": D, "L": len(points), "K": sum(points), "Q": self.Q}

    @property
    def Q(self) -> int:
        return self.arrays["locations"].shape[1]

    @property
    def contiguous_starts(self) -> tuple[int, ...]:
        """First pixel of each level, given or not."""
        if self.starts is not None:
            return self.starts
        ends = np.cumsum([0, *(h * w for h, w in self.levels)])
        return tuple(int(end) for end in ends[:-1])

    def features(self) -> list[str]:
        """What is special about this call, for the counts of a record."""
        sizes, form = self.sizes, self.form
        found = ["fused" if form.fused else "plain", self.style]
        found += [f"empty {name}" for name, size in sizes.items() if size == 0]
        found += [name for name in ("packed", "ragged", "per_level", "align_corners") if getattr(form, name)]
        found += [form.interpolation] if form.interpolation != "bilinear" else []
        found += [form.padding_mode] if form.padding_mode != "zeros" else []
        found += sorted({f"layout {layout.partition(':')[0]}" for layout in self.layouts.values()})
        found += ["sparse"] if sizes["S"] > 5000 else []
        found += ["explicit starts"] if self.starts is not None else []
        found += [f"changes {self.changes}"] if self.changes else []
        return found + ([f"invalid {self.invalid}"] if self.invalid else [])


def draw_form(pick: random.Random) -> Form:
    """The compile-time part of a call, with few samples and channels."""
    choice, chance = pick.choice, pick.random
    pair = choice(DTYPE_PAIRS)
    L = 0 if chance() < 0.02 else choice((1, 1, 2, 2, 3, 4))
    per_level = L > 0 and chance() < 0.25
    if per_level and chance() < 0.8:
        points = tuple(pick.randint(1, 4) for _ in range(L))
    else:
        points = (0 if chance() < 0.02 and not per_level else choice((1, 1, 2, 3, 4)),) * L
    interpolation, padding_mode, align_corners = choice(VARIANTS)
    fused = chance() < 0.4
    references = choice((pair[0], "float32")) if pair[0] in ("float16", "bfloat16") else pair[0]
    return Form(
        M=0 if chance() < 0.02 else choice((1, 1, 2, 2, 3)),
        D=0 if chance() < 0.02 else choice((1, 2, 3, 4, 5, 8, 8, 16)),
        points=points,
        per_level=per_level,
        dtypes=(*pair, references),
        interpolation=interpolation,
        padding_mode=padding_mode,
        align_corners=align_corners,
        coordinates=choice((2, 2, 4)) if fused else 0,
        reference_levels=(1 if chance() < 0.3 else L) if fused else 0,
        packed=fused and chance() < 0.4,
        ragged=chance() < 0.15,
    )


def draw(seed: int, form: Form | None = None, layout_seed: int | None = None, large: bool = False) -> Case:
    """The call of this seed.

    `form` replaces the one that is drawn. Calls of one `layout_seed` and form differ in their numbers only. `large`
    calls have as many samples as fill a GPU.
    """
    pick = random.Random(seed if layout_seed is None else layout_seed)
    drawn = draw_form(pick)
    form = form or drawn
    L = len(form.points)
    levels = tuple((pick.randint(8, 24), pick.randint(8, 24)) if large else _draw_level(pick) for _ in range(L))
    starts, S = _draw_starts(pick, levels)
    N = 0 if pick.random() < 0.02 else pick.choice((1, 1, 2, 3))
    Q = 0 if pick.random() < 0.02 else pick.choice((1, 2, 3, 5, 7, S if 0 < S <= 40 else 4))
    if large and N * Q:
        most = min(SAMPLES, SAMPLES * 32 // max(1, form.D)) // (N * max(1, form.M * sum(form.points)))
        Q = max(1, most if most < S else pick.choice((S, most)))
    style = random.Random(f"style {seed}").choice(STYLES)
    layouts = _draw_layouts(pick, form, (N, S, Q))
    sparse = pick.random() < 0.02 and not large and N > 0 and L > 0 and 0 < form.M * form.D <= 4
    if sparse:
        N, (starts, S) = 1, _draw_far_starts(pick, levels)
        layouts["value"] = "expanded:1"
    lengths = tuple(pick.choice((0, Q, pick.randint(0, Q))) for _ in range(N)) if form.ragged else None
    rng = np.random.default_rng(seed)
    arrays = draw_arrays(rng, form, levels, (N, S, Q), style)
    for name, layout in layouts.items():
        if layout.startswith("expanded"):
            # In a packed call, logits lie in the array of the offsets.
            for one in (name, "weights") if form.packed and name == "locations" else (name,):
                arrays[one] = _repeat(arrays[one], int(layout.partition(":")[2]))
    case = Case(
        seed=seed,
        form=form,
        levels=levels,
        starts=starts,
        lengths=lengths,
        arrays=arrays,
        layouts=layouts,
        forms=_draw_forms(pick, levels, starts, lengths),
        wanted=_draw_wanted(pick, form),
        deterministic=pick.choice((None, None, True, False)),
        im2col_step=pick.choice((64, 64, 1, 2, 3, 1000)),
        framework=pick.choice(("numpy", "torch")),
        registered=pick.choice(("direct", "direct", "mode", "vjp")),
        small_blocks=pick.random() < 0.15,
        style=style,
    )
    if any(layout == "negated" for layout in layouts.values()):
        case = replace(case, framework="torch")
    if pick.random() < 0.03:
        case = replace(case, changes=pick.choice([name for name in case.forms if name != "num_points"]))
    return _spoil(case, pick) if pick.random() < 0.03 else case


def _draw_level(pick: random.Random) -> tuple[int, int]:
    kind = pick.random()
    if kind < 0.25:
        return pick.choice((1, 2, 4, 8)), pick.choice((1, 2, 4, 8))  # pixel coordinates without rounding
    if kind < 0.28:
        return pick.choice(((1, 300), (200, 1)))
    return pick.randint(1, 9), pick.randint(1, 9)


def _draw_starts(pick: random.Random, levels: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...] | None, int]:
    """Starts and S: contiguous levels by None or by numbers, or levels that overlap and leave gaps."""
    sizes = [h * w for h, w in levels]
    contiguous = tuple(sum(sizes[:level]) for level in range(len(sizes)))
    kind = pick.random()
    if kind < 0.4:
        return None, sum(sizes)
    if kind < 0.7:
        return contiguous, sum(sizes) + pick.choice((0, 0, 3))
    S = max(sizes, default=0) + pick.randint(0, 30)
    return tuple(pick.randint(0, S - size) for size in sizes), S


def _draw_far_starts(pick: random.Random, levels: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], int]:
    """A large S, of which the levels are the end, the beginning, or something in between."""
    S = pick.choice((70_000, 140_000, 300_000))
    return tuple(pick.choice((0, S - h * w, pick.randint(0, S - h * w))) for h, w in levels), S


def _draw_layouts(pick: random.Random, form: Form, sizes: tuple[int, int, int]) -> dict[str, str]:
    """How each array lies in memory; the axis of stride 0 follows "expanded"."""
    layouts = {}
    if pick.random() < 0.45:
        return layouts
    N, S, Q = sizes
    negated = pick.random() < 0.05
    for name in ("grad_output", *form.names):
        if pick.random() < 0.35:
            layout = pick.choice(LAYOUTS[:-1]) if not negated else "negated"
            if layout == "expanded":
                axes = [0, 1, *((2,) if name in ("value", "locations", "weights") else ())]
                axis = pick.choice(axes)
                extent = (N, S if name == "value" else Q, form.M)[axis]
                layout = f"expanded:{axis}" if extent else "transposed"
            if layout == "negated" and form.dtype_of(name) not in ("float32", "float64"):
                continue  # no complex dtype whose parts these are
            layouts[name] = layout
    return layouts


def _draw_forms(
    pick: random.Random,
    levels: tuple[tuple[int, int], ...],
    starts: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
) -> dict[str, str]:
    """How each piece of metadata is passed."""
    forms = {}
    numbers = {"shapes": [size for level in levels for size in level], "starts": starts, "lengths": lengths}
    for name, given in numbers.items():
        if given is None:
            continue
        form = pick.choice(METADATA_FORMS)
        if "uint8" in form and max(given, default=0) > 255:
            form = "array:uint64"
        forms[name] = form
    forms["num_points"] = pick.choice(("tuple", "tuple", "list"))
    return forms


def _draw_wanted(pick: random.Random, form: Form) -> tuple[str, ...]:
    names = form.names
    if form.interpolation == "nearest":  # the torch functions refuse a gradient that does not exist
        names = ("value", "locations") if form.packed else ("value", "weights")
    elif form.packed:  # offsets and logits are one tensor
        names = ("value", "locations", "references")
    if pick.random() < 0.6:
        return names
    return tuple(name for name in names if pick.random() < 0.6)


def _repeat(array: np.ndarray, axis: int) -> np.ndarray:
    """The first entry along `axis` in the place of all others."""
    return np.broadcast_to(array.take([0], axis), array.shape)


def _spoil(case: Case, pick: random.Random) -> Case:
    """The call with one error in its metadata, which every path refuses."""
    levels, S, Q = case.levels, case.sizes["S"], case.Q
    starts = case.contiguous_starts
    if not levels:
        return case
    at = pick.randrange(len(levels))

    def changed(numbers: tuple, number) -> tuple:
        return (*numbers[:at], number, *numbers[at + 1 :])

    h, w = levels[at]
    ways = {
        "level beyond S": {"levels": changed(levels, (h + S, w))},
        "size of zero": {"levels": changed(levels, (h, 0))},
        "negative size": {"levels": changed(levels, (-h, -w))},
        "start beyond S": {"starts": changed(starts, S)},
        "negative start": {"starts": changed(starts, -1)},
    }
    if case.lengths:
        ways["length beyond Q"] = {"lengths": (Q + 1, *case.lengths[1:])}
        ways["negative length"] = {"lengths": (-1, *case.lengths[1:])}
    name = pick.choice(list(ways))
    forms = dict.fromkeys(case.forms, "list") | {"num_points": "tuple"}
    if "starts" in ways[name]:
        forms["starts"] = "list"
    return replace(case, **ways[name], forms=forms, invalid=name, changes=None)
