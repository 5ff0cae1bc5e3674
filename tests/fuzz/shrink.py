"""A failing call made smaller while it fails in the same way, and as Python code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from .draw import Case, Form


def shrink(case: Case, fails: Callable[[Case], bool], rounds: int = 12) -> Case:
    """A simpler call for which `fails` is true too."""
    for _ in range(rounds):
        smaller = next((one for one in simpler(case) if fails(one)), None)
        if smaller is None:
            break
        case = smaller
        # Take each kind of step as often as it helps before the next round begins.
        for one in simpler(case):
            if one is not case and _size(one) < _size(case) and fails(one):
                case = one
    return case


def _size(case: Case) -> int:
    return sum(array.size for array in case.arrays.values()) + len(case.levels) + len(case.layouts)


def simpler(case: Case) -> Iterator[Case]:
    """Calls with one thing less."""
    N, Q, M, K = case.arrays["weights"].shape
    form = case.form
    yield from _plainer_settings(case)
    for axis, extent in (("N", N), ("Q", Q), ("M", M), ("K", K), ("D", form.D)):
        if extent > 1:
            for at in range(min(extent, 12)):
                yield _only(case, axis, at)
    if case.levels and (case.starts is not None or case.sizes["S"] > sum(h * w for h, w in case.levels)):
        packed = _pack(case)
        if packed is not None:
            yield packed
    for name, array in case.arrays.items():
        if array.size and not np.isfinite(array.astype(np.float64)).all():
            yield _with_array(case, name, np.where(np.isfinite(array.astype(np.float64)), array, array.dtype.type(0.5)))
        rounded = np.round(array.astype(np.float64) * 4) / 4
        if array.size and not np.array_equal(rounded, array.astype(np.float64), equal_nan=True):
            yield _with_array(case, name, rounded.astype(array.dtype))
        ones = np.where(np.isfinite(rounded), 1.0, rounded).astype(array.dtype)
        if name != "locations" and array.size and not np.array_equal(ones, array, equal_nan=True):
            yield _with_array(case, name, ones)


def _plainer_settings(case: Case) -> Iterator[Case]:
    form = case.form
    for name in case.layouts:
        yield replace(case, layouts={key: one for key, one in case.layouts.items() if key != name})
    plain = dict.fromkeys(case.forms, "list")
    if case.forms != plain:
        yield replace(case, forms=plain)
    for name, given in case.forms.items():
        if given not in ("list", "tuple"):
            yield replace(case, forms=case.forms | {name: "list"})
    settings = {"changes": None, "small_blocks": False, "deterministic": None, "im2col_step": 64}
    settings |= {"framework": "numpy", "registered": "direct"}
    for name, plain_setting in settings.items():
        if getattr(case, name) != plain_setting and "negated" not in case.layouts.values():
            yield replace(case, **{name: plain_setting})
    if case.lengths is not None:
        yield replace(case, lengths=None, form=replace(form, ragged=False))
    for name in case.wanted:
        yield replace(case, wanted=tuple(one for one in case.wanted if one != name))
    if form.padding_mode == "border":
        yield replace(case, form=replace(form, padding_mode="zeros"))
    if form.align_corners:
        yield replace(case, form=replace(form, align_corners=False))
    if form.packed:
        yield replace(case, form=replace(form, packed=False), wanted=tuple(n for n in case.wanted if n != "weights"))
    if form.per_level and len(set(form.points)) == 1:
        yield replace(case, form=replace(form, per_level=False))
    wider = {"float16": "float32", "bfloat16": "float32"}
    dtypes = tuple(wider.get(dtype, dtype) for dtype in form.dtypes)
    if dtypes != form.dtypes:
        arrays = {name: a.astype(np.float32) for name, a in case.arrays.items()}
        yield replace(case, form=replace(form, dtypes=dtypes), arrays=arrays)


def _only(case: Case, axis: str, at: int) -> Case:
    """The call with one image, query, head, sample or channel."""
    form, arrays, lengths = case.form, case.arrays, case.lengths

    def take(name: str, along: int) -> np.ndarray:
        return np.ascontiguousarray(arrays[name].take([at], along))

    if axis == "N":
        taken = {name: take(name, 0) for name in arrays}
        return replace(case, arrays=taken, lengths=lengths and (lengths[at],))
    if axis == "Q":
        taken = {name: array if name == "value" else take(name, 1) for name, array in arrays.items()}
        return replace(case, arrays=taken, lengths=lengths and tuple(int(at < one) for one in lengths))
    if axis == "M":
        taken = {name: array if name == "references" else take(name, 2) for name, array in arrays.items()}
        return replace(case, arrays=taken, form=replace(form, M=1))
    if axis == "D":
        taken = {name: take(name, 3) if name in ("value", "grad_output") else array for name, array in arrays.items()}
        return replace(case, arrays=taken, form=replace(form, D=1))
    level = int(form.level_of_samples[at])
    taken = {name: take(name, 3) if name in ("locations", "weights") else a for name, a in arrays.items()}
    if form.reference_levels > 1:
        taken["references"] = np.ascontiguousarray(arrays["references"].take([level], 2))
    smaller: Form = replace(form, points=(1,), reference_levels=min(form.reference_levels, 1))
    return replace(
        case, form=smaller, arrays=taken, levels=(case.levels[level],), starts=(case.contiguous_starts[level],)
    )


def _pack(case: Case) -> Case | None:
    """The pixels of the levels and no others, levels contiguous; None for metadata that makes no sense."""
    value, parts = case.arrays["value"], []
    for (h, w), start in zip(case.levels, case.contiguous_starts, strict=True):
        if min(h, w) < 1 or start < 0 or start + h * w > value.shape[1]:
            return None
        parts.append(value[:, start : start + h * w])
    arrays = case.arrays | {"value": np.ascontiguousarray(np.concatenate(parts, 1))}
    forms = {name: given for name, given in case.forms.items() if name != "starts"}
    return replace(case, arrays=arrays, starts=None, forms=forms, layouts={})


def _with_array(case: Case, name: str, array: np.ndarray) -> Case:
    return replace(case, arrays=case.arrays | {name: array})


def code(case: Case) -> str:
    """The call as Python code: the torch function with the gradients that are wanted."""
    from .passing import shaped

    form, arrays = case.form, shaped(case)
    lines = ["import torch", "from torch import inf, nan, tensor", "from cupy_msda.torch import *", ""]
    for name, array in arrays.items():
        numbers = array.astype(np.float64).tolist() if array.size else f"torch.empty({list(array.shape)})"
        made = f"tensor({numbers})" if array.size else numbers
        lines.append(f"{name} = {made}.to(torch.{form.dtype_of(name)}){'.requires_grad_()' * (name in case.wanted)}")
    given = [("value", "value"), *((("references", "references"),) if form.fused else ()), ("locations", "locations")]
    given += [("weights", "weights")] if "weights" in arrays else []
    names = [name for name, _ in given]
    names[1:1] = [str([list(level) for level in case.levels]), str(case.starts and list(case.starts))]
    keywords = [f"num_points={list(form.points)}"] if form.per_level else []
    keywords += [f"{name}={one!r}" for name, one in form.variant.items() if one not in ("bilinear", "zeros", False)]
    keywords += [f"query_lengths={list(case.lengths)}"] if case.lengths is not None else []
    function = "ms_deform_attn_fused" if form.fused else "ms_deform_attn"
    lines.append(f"output = {function}({', '.join([*names, *keywords])})")
    if case.wanted:
        wanted = [name for name in case.wanted if name in arrays]
        lines.append(f"grads = torch.autograd.grad(output, [{', '.join(wanted)}], grad_output)")
    notes = {"layouts": case.layouts, "metadata as": case.forms, "changed before the backward": case.changes}
    notes |= {"framework of the array function": case.framework, "registered operator by": case.registered}
    return "\n".join([*lines, *(f"# {name}: {note}" for name, note in notes.items() if note)])
