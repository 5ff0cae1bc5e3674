"""``python -m cupy_msda explain``: which kernels calls of given sizes take, and why."""

from __future__ import annotations

import argparse
from typing import Any

from ..explanation import explain
from . import sizes_argument
from .output import CommandError, say


def add(commands: Any) -> None:
    """The parser of the command."""
    words = "say which kernels a call takes, why, and what would make it faster"
    parser = commands.add_parser("explain", help=words, description=f"{words.capitalize()}.")
    parser.add_argument("--sizes", required=True, metavar="TEXT", help=sizes_argument.HELP)
    parser.add_argument(
        "--dtype",
        type=sizes_argument.dtypes,
        default="float32",
        help=f"{sizes_argument.DTYPES_HELP} (default: %(default)s)",
    )
    parser.add_argument("--deterministic", action="store_true", help="a call with deterministic=True")
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    parser.add_argument("--gpu", type=int, metavar="NUMBER", help="explain for a compute capability, 80 for 8.0")


def run(options: argparse.Namespace) -> int:
    sizes = sizes_argument.read(options.sizes)
    try:
        say(
            str(
                explain(
                    sizes,
                    dtype=options.dtype,
                    backward=not options.forward,
                    gpu=options.gpu,
                    deterministic=options.deterministic,
                )
            )
        )
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return 0
