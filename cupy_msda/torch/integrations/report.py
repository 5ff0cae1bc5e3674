"""What a patch of a model says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What became of one function, autograd function or layer.

    Attributes
    ----------
    name : str
        ``module.name``, or the name of a layer in the model.
    status : str
        "served", "kept" (the original answers) or "compiled already".
    convention : str
        The layouts that it takes, where it is served.
    calls : int
        Calls that the operator has answered. Calls in compiled code are not counted.
    reason : str
        Why it is kept, which calls went to the original and why, or what could not be compared.
    """

    name: str
    status: str
    convention: str = ""
    calls: int = 0
    reason: str = ""

    def __str__(self) -> str:
        calls = f"{self.calls or 'no'} calls" if self.status == "served" else ""
        return "; ".join(filter(None, (f"{self.status}: {self.name}", calls, self.convention, self.reason)))


class Report(tuple[Line, ...]):
    """Lines, printed one under the other."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing that is named after deformable attention is loaded"
