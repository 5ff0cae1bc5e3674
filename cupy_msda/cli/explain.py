"""``python -m cupy_msda explain``: which kernels calls of given sizes take, and why."""

from __future__ import annotations

import argparse
from typing import Any

from ..explanation import explain
from . import architecture_argument, environment, sizes_argument
from .output import CommandError, say, sentence

_NOTES = (
    "Without --gpu: on the GPU of this machine, or on the CPU where there is none. The function cupy_msda.explain also "
    "takes the arrays of a call."
)


def add(commands: Any) -> None:
    """The parser of the command."""
    words = "say which kernels a call takes, why, and what would make it faster"
    parser = commands.add_parser("explain", help=words, description=f"{sentence(words)} {_NOTES}")
    parser.add_argument("--sizes", required=True, metavar="TEXT", help=sizes_argument.HELP)
    parser.add_argument(
        "--dtype",
        type=sizes_argument.dtypes,
        default="float32",
        help=f"{sizes_argument.DTYPES_HELP} (default: %(default)s)",
    )
    parser.add_argument("--deterministic", action="store_true", help="a call with deterministic=True")
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    parser.add_argument("--gpu", metavar="CAPABILITY", help="explain for a GPU that need not be here: 8.6, 86 or sm_86")


def run(options: argparse.Namespace) -> int:
    environment.refuse_wrong_variables()
    sizes = sizes_argument.read(options.sizes)
    gpu = None if options.gpu is None else architecture_argument.read(options.gpu, "--gpu")
    try:
        say(
            str(
                explain(
                    sizes,
                    dtype=options.dtype,
                    backward=not options.forward,
                    gpu=gpu,
                    deterministic=options.deterministic,
                )
            )
        )
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    return 0
