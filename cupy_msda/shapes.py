"""Which shapes of arrays go together in a call, and messages that say where each expected size comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from .call import ArgumentNames, FusedFrontEnd, Variant

Shape = tuple[int, ...]
# Other orders in which a value comes, and pairs of dimensions that are exchanged in locations or weights.
_VALUE_ORDERS = ("N, M, S, D", "S, N, M, D", "N, S, D, M", "N, M, D, S")
_EXCHANGES = (("Q", "M"), ("N", "Q"), ("M", "L"))


@dataclass(frozen=True)
class Shapes:
    """The shapes of one call by the names of its arguments, of which ``spatial_shapes`` has the shape [L, 2].

    `pixels` returns the least S that the levels need, or None where the host does not know. An error asks for it.
    """

    given: Mapping[str, Shape]
    names: ArgumentNames
    variant: Variant
    pixels: Callable[[], int | None]

    def read_value(self) -> tuple[int, int, int, int]:
        """N, S, M and D."""
        N, S, M, D = self._dimensions("value", "N, S, M, D")
        return N, S, M, D

    def read_samples(self) -> tuple[int, int]:
        """Q and P of locations and weights, or of offsets and logits; P is 0 where `num_points` says it per level."""
        N, _, M, _ = self.given["value"]
        L, points = self._L, self.variant.num_points
        samples: Shape
        if points is None:
            _, Q, _, _, P, _ = self._dimensions(self.names.locations, "N, Q, M, L, P, 2")
            samples, symbols = (L, P), "L, P"
        else:
            _, Q, _, _, _ = self._dimensions(self.names.locations, "N, Q, M, sum(num_points), 2")
            P, samples, symbols = 0, (sum(points),), "sum(num_points)"
        self._check(self.names.locations, f"N, Q, M, {symbols}, 2", (N, Q, M, *samples, 2))
        self._check(self.names.weights, f"N, Q, M, {symbols}", (N, Q, M, *samples))
        return Q, P

    def read_packed(self) -> tuple[int, int]:
        """Q and P of offsets and logits in one array."""
        N, _, M, _ = self.given["value"]
        L, points = self._L, self.variant.num_points
        symbols = f"N, Q, M, {'L*P*3' if points is None else 'sum(num_points)*3'}"
        _, Q, _, numbers = self._dimensions(self.names.locations, symbols, f" without {self.names.weights}")
        P = 0 if points is not None else numbers // max(3 * L, 1)
        expected = (N, Q, M, 3 * sum((P,) * L if points is None else points))
        self._check(self.names.locations, symbols, expected, f" without {self.names.weights}")
        return Q, P

    def read_references(self, Q: int, dtype: str, packed: bool) -> FusedFrontEnd:
        """The form of the reference points [N, Q, L or 1, 2 or 4], which have this dtype."""
        N = self.given["value"][0]
        _, _, levels, coordinates = self._dimensions("reference_points", "N, Q, L, 2")
        symbols = f"N, Q, {'1' if levels == 1 else 'L'}"
        if coordinates not in (2, 4):
            raise ValueError(
                f"reference_points: expected shape [{symbols}, 2] for points or [{symbols}, 4] for boxes, "
                f"got {list(self.given['reference_points'])}"
            )
        expected = (N, Q, 1 if levels == 1 else self._L, coordinates)
        self._check("reference_points", f"{symbols}, {coordinates}", expected)
        return FusedFrontEnd(coordinates, levels, dtype, packed)

    def check_grad_output(self, Q: int) -> None:
        """The gradient of the output has the output's shape."""
        N, _, M, D = self.given["value"]
        self._check("grad_output", "N, Q, M*D", (N, Q, M * D))

    @property
    def _L(self) -> int:
        return self.given["spatial_shapes"][0]

    def _dimensions(self, name: str, symbols: str, form: str = "") -> Shape:
        shape = self.given[name]
        if len(shape) != symbols.count(",") + 1:
            raise ValueError(f"{name}{form}: expected shape [{symbols}], got {list(shape)}")
        return shape

    def _check(self, name: str, symbols: str, expected: Shape, form: str = "") -> None:
        shape = self.given[name]
        if shape == expected:
            return
        if len(shape) == len(expected):
            self._refuse(name, symbols.split(", "), expected, form)
        raise ValueError(f"{name}{form}: expected shape [{symbols}] = {list(expected)}, got {list(shape)}")

    def _refuse(self, name: str, symbols: Sequence[str], expected: Shape, form: str) -> NoReturn:
        """Says which argument each expected size comes from, and where the order of dimensions looks like another."""
        shape, value = self.given[name], self.given["value"]
        if name == self.names.locations and (shape[0], shape[2]) != (value[0], value[2]):
            order = self._order_of_value(N=shape[0], M=shape[2])
            if order is not None:
                raise ValueError(
                    f"value: expected shape [N, S, M, D], got {list(value)}, which looks like [{order}]: "
                    f"N = {shape[0]} and M = {shape[2]} are those of {name} {list(shape)}"
                )
        # Nothing else says what Q and P of locations are.
        known = dict(zip(symbols, expected, strict=True))
        if name == self.names.locations:
            known = {symbol: size for symbol, size in known.items() if symbol not in ("Q", "P")}
        notes = _other_order(symbols, shape, known)
        for symbol, size, want in zip(symbols, shape, expected, strict=True):
            source = self._source_of(symbol)
            if size != want and source not in (name, None):
                of = list(self.given[source]) if source in self.given else list(self.variant.num_points or ())
                notes += f"; {symbol} = {want} is that of {source} {of}"
            elif size != want and symbol == "L*P*3":
                notes += f"; it is a multiple of 3*L, and L = {self._L} is that of spatial_shapes"
        raise ValueError(
            f"{name}{form}: expected shape [{', '.join(symbols)}] = {list(expected)}, got {list(shape)}{notes}"
        )

    def _source_of(self, symbol: str) -> str | None:
        """The argument that a size comes from."""
        if symbol in ("Q", "P"):
            return self.names.locations
        if "num_points" in symbol:
            return "num_points"
        return {"N": "value", "M": "value", "M*D": "value", "L": "spatial_shapes"}.get(symbol)

    def _order_of_value(self, N: int, M: int) -> str | None:
        """The order of dimensions, other than the contract's, in which value has these sizes."""
        pixels = self.pixels()
        for order in _VALUE_ORDERS:
            sizes = dict(zip(order.split(", "), self.given["value"], strict=True))
            enough = sizes["S"] > M if pixels is None else sizes["S"] >= pixels
            if sizes["N"] == N and sizes["M"] == M and enough:
                return order
        return None


def _other_order(symbols: Sequence[str], shape: Shape, known: Mapping[str, int]) -> str:
    """A note where exchanging two dimensions gives the sizes that are known."""
    for exchanged in _EXCHANGES:
        if set(exchanged) <= set(symbols):
            names = dict(zip(exchanged, reversed(exchanged), strict=True))
            order = [names.get(symbol, symbol) for symbol in symbols]
            sizes = dict(zip(order, shape, strict=True))
            if all(sizes[symbol] == size for symbol, size in known.items()):
                return f", which looks like [{', '.join(order)}]"
    return ""
