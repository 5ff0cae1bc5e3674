"""Sizes of a call as text, for the commands: `levels=100x167,50x84 N=2 Q=300`, or the name of a workload."""

from __future__ import annotations

import argparse
import dataclasses
import re

from ..cuda.workloads import WORKLOADS
from ..sizes import Sizes, read_dtypes
from .output import CommandError

HELP = (
    "as 'levels=100x167,50x84 N=2 Q=300 M=8 D=32 P=4': the fields of cupy_msda.Sizes, without Q for pixels as "
    f"queries, and words such as packed for what is a flag; or one of {', '.join(WORKLOADS)}"
)
DTYPES_HELP = "of value, or of value and locations: float16/float32"
_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Sizes)}


def read(text: str) -> Sizes:
    """The sizes of a text.

    Raises
    ------
    CommandError
        For a text that describes none.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    given: dict[str, object] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in _FIELDS:
            raise CommandError(f"--sizes: expected {', '.join(_FIELDS)}, got {name!r}")
        if name in given:
            raise CommandError(f"--sizes: expected {name} once, got it twice")
        try:
            given[name] = _value(name, value)
        except ValueError:
            raise CommandError(f"--sizes: expected sizes {HELP}; got {word!r}") from None
    if "levels" not in given:
        raise CommandError(f"--sizes: expected sizes {HELP}; got {text!r}")
    try:
        return Sizes(**given)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise CommandError(f"--sizes: {error}") from error


def dtypes(text: str) -> str:
    """A dtype of value, or "float16/float32", for argparse."""
    try:
        read_dtypes("a dtype", text)
    except TypeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _value(name: str, text: str) -> object:
    if name == "levels":
        found = [re.fullmatch(r"(\d{1,6})x(\d{1,6})", level) for level in text.split(",")]
        if None in found:
            raise ValueError
        return tuple((int(match[1]), int(match[2])) for match in found if match)
    if name == "num_points":
        return tuple(int(number) for number in text.split(","))
    if _FIELDS[name] == "bool":
        if text not in ("", "true", "false"):
            raise ValueError
        return text != "false"
    if "int" in _FIELDS[name]:
        if not re.fullmatch(r"\d{1,12}", text):
            raise ValueError
        return int(text)
    return text
