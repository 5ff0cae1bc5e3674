"""Metadata on the device that nobody has checked: levels that do not fit or wrap around, and wrong lengths."""

from __future__ import annotations

import random
from dataclasses import replace

from .draw import Case

MOST = 2**63 - 1
SIZES = (0, -1, -7, 1, 2, 3, 300, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**33 + 2, 2**62, MOST, -MOST - 1)
STARTS = (-1, -(2**31), 2**31, 2**32, MOST, -MOST - 1)
LENGTHS = (-1, -(2**40), 2**31, 2**40, MOST, -MOST - 1)


def with_hostile_metadata(case: Case, pick: random.Random) -> Case:
    """The call with metadata on the device, of which some numbers are bad."""
    levels, starts, lengths = list(case.levels), case.starts, case.lengths
    S = case.sizes["S"]
    for at in range(len(levels)):
        kind = pick.random()
        if kind < 0.25:
            pair = list(levels[at])
            pair[pick.randrange(2)] = pick.choice(SIZES)
            levels[at] = tuple(pair)
        elif kind < 0.35:
            levels[at] = (pick.choice(SIZES), pick.choice(SIZES))
        elif kind < 0.45 and starts is not None:
            starts = (*starts[:at], pick.choice((*STARTS, S, S - 1, S + 1)), *starts[at + 1 :])
    if lengths is not None:
        lengths = tuple(pick.choice(LENGTHS) if pick.random() < 0.4 else length for length in lengths)
    wide = {name: form for name, form in case.forms.items() if name == "num_points"}
    forms = wide | {name: "tensor" for name in case.forms if name != "num_points"}
    return replace(
        case, levels=tuple(levels), starts=starts, lengths=lengths, forms=forms, on_device=True, changes=None
    )  # fmt: skip


def fitting_levels(case: Case) -> list[tuple[int, int, int] | None]:
    """(H, W, start) of each level as the device has it, or None for one that does not fit into S."""
    S, end, found = case.sizes["S"], 0, []
    for at, (h, w) in enumerate(case.levels):
        start = _wrapped(end) if case.starts is None else case.starts[at]
        end += h * w
        fits = 0 < h < 2**31 and 0 < w < 2**31 and 0 <= start <= S and h * w <= S - start
        found.append((h, w, start) if fits else None)
    return found


def _wrapped(number: int) -> int:
    """In 64 bits with a sign, as the sums of the kernels are."""
    return (number + 2**63) % 2**64 - 2**63
