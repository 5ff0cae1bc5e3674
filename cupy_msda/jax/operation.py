"""What one custom call computes: its static part, as JAX keeps it with the call and as an attribute of the call.

Arrays come in the order of :data:`Operation.roles`. An operation has no sizes: they follow from the shapes of the
arrays, which differ between devices and grow under ``vmap``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..arrays import Device
from ..call import PLAIN, FusedFrontEnd, Problem, Variant, Wanted
from ..validate import equal_points

Shape = tuple[int, ...]
# Arrays without a dimension N.
METADATA = ("shapes", "starts")


@dataclass(frozen=True)
class Operation:
    """A forward, or the gradients that are `wanted`.

    `levels` holds (H, W, start) of each level, or is None where the metadata are arrays: `shapes`, and `starts` if
    there is one. `coordinates` is 2 or 4 in a fused call, 0 in a plain one. L is the number of levels.
    """

    L: int
    levels: tuple[tuple[int, int, int], ...] | None
    starts: bool = False
    ragged: bool = False
    coordinates: int = 0
    packed: bool = False
    variant: Variant = PLAIN
    im2col_step: int = 64
    deterministic: bool = False
    wanted: Wanted | None = None

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The arrays that have gradients, in the order of `Wanted`."""
        weights = () if self.packed else ("weights",)
        return ("value", "locations", *weights, *(("references",) if self.coordinates else ()))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arrays of a forward, in their order."""
        metadata = () if self.levels is not None else (("shapes", "starts") if self.starts else ("shapes",))
        return (*self.differentiable, *metadata, *(("lengths",) if self.ragged else ()))

    @property
    def roles(self) -> tuple[str, ...]:
        """All arrays, in their order."""
        return self.inputs if self.wanted is None else ("grad_output", *self.inputs)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The inputs whose gradients are results, in their order."""
        return tuple(name for name in self.differentiable if self.wanted is not None and getattr(self.wanted, name))

    def backward(self, names: Sequence[str]) -> Operation:
        """The operation that computes the gradients of the inputs of these `names`, and what comes with them."""
        asked = {name: name in names for name in ("value", "locations", "weights", "references")}
        if asked["references"]:
            asked["locations"] = True
        return replace(self, wanted=Wanted(**asked))

    def problem(self, shapes: dict[str, Shape], dtypes: dict[str, str], device: Device) -> Problem:
        """The problem of a call whose arrays have these shapes and dtypes, by their roles."""
        N, S, M, D = shapes["value"]
        fused = None
        if self.coordinates:
            levels, coordinates = shapes["references"][2:]
            fused = FusedFrontEnd(coordinates, levels, dtypes["references"], self.packed)
        P = 0
        if self.variant.num_points is None:
            P = shapes["locations"][3] // max(3 * self.L, 1) if self.packed else shapes["locations"][4]
        variant, P = equal_points(self.variant, P)
        return Problem(
            N, S, M, D, self.L, P, shapes["locations"][1],
            value_dtype=dtypes["value"],
            location_dtype=dtypes["locations"],
            device=device,
            levels=self.levels,
            im2col_step=self.im2col_step,
            deterministic=self.deterministic,
            variant=variant,
            ragged=self.ragged,
            fused=fused,
        )  # fmt: skip

    def results(self, shapes: dict[str, Shape], dtypes: dict[str, str]) -> list[tuple[Shape, str]]:
        """Shape and dtype of each result."""
        if self.wanted is None:
            N, _, M, D = shapes["value"]
            return [((N, shapes["locations"][1], M * D), dtypes["value"])]
        return [(shapes[name], dtypes[name]) for name in self.gradients]

    def encode(self, arrays: Sequence[tuple[Shape, str]] | None = None, workspace: int = 0) -> str:
        """As an attribute that any process reads; with the shapes and dtypes of all arrays, if they are known.

        These are not read again, nor is `workspace`, the bytes of the result that is the workspace. They make calls
        whose kernels differ differ in their attributes.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(fields | {"arrays": arrays, "workspace": workspace}, separators=(",", ":"))

    @staticmethod
    def decode(attribute: bytes) -> tuple[Operation, bool]:
        """The operation, and whether the attribute has the shapes of the arrays."""
        fields = json.loads(attribute)
        sized = fields.pop("arrays") is not None
        fields.pop("workspace", None)
        if fields["levels"] is not None:
            fields["levels"] = tuple(tuple(level) for level in fields["levels"])
        num_points, *others = fields["variant"]
        fields["variant"] = Variant(None if num_points is None else tuple(num_points), *others)
        if fields["wanted"] is not None:
            fields["wanted"] = Wanted(*fields["wanted"])
        return Operation(**fields), sized
