"""The command line: ``python -m cupy_msda demo | info | check | tune | explain | export-kernels``."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TextIO

from . import __version__
from .cli import check, demo, environment, explain, export_kernels, info, photograph, picture, sizes_argument, tune
from .cli.output import CommandError, OutputError, complain, discard, flush, say, sentence

OUT = "msda_demo.png"
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells count it
_CHECK = "Exit status: 0 where every result is right, 1 where one is wrong, 2 where nothing can be checked."
_EXPORT = (
    "cupy_msda_launch.h documents the functions, cupy_msda_kernels.h the configurations. No GPU and no compiler is "
    "needed."
)
_DEMO = f"""
An image of any mode becomes RGB, upright and on white; of several frames the first. It may have up to
{photograph.MAX_PIXELS:,} pixels, for which the demo takes 1.5 GB of memory. It is made smaller, in proportion,
until its longer side has at most {photograph.LONGEST_SIDE} pixels. The picture has at most
{picture.WIDTH * picture.DOTS} x {picture.HEIGHT * picture.DOTS} pixels. An existing file of its name is replaced.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns 0 for success, 1 for a check with a wrong result, 2 for a request that cannot be met, 130 after Ctrl-C, 141
    where standard output is closed.
    """
    try:
        try:
            return _run(_parser().parse_args(arguments))
        finally:
            flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OutputError as error:
        discard()
        if not error.closed:
            complain(f"cupy_msda: {error}")
        return error.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cupy_msda", description="Multi-scale deformable attention")
    parser.add_argument("--version", action="version", version=f"cupy_msda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    words = "run the operator on a photograph, forward and backward, and draw it"
    of_demo = commands.add_parser("demo", help=words, description=f"{sentence(words)} {_DEMO}")
    of_demo.add_argument(
        "image",
        nargs="?",
        default=str(demo.PHOTOGRAPH),
        help="any image that Pillow reads (default: a photograph of a cat)",
    )
    of_demo.add_argument(
        "--out",
        default=OUT,
        help="picture to write; its suffix is a format of matplotlib, and PNG where it has none (default: %(default)s)",
    )
    of_demo.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what to run on; auto: cuda where it can be used, otherwise cpu (default: %(default)s)",
    )
    words = "print versions, GPU, kernel cache, and what is missing"
    commands.add_parser("info", help=words, description=sentence(words))
    words = "run the golden cases on every backend of this machine"
    commands.add_parser("check", help=words, description=f"{sentence(words)} {_CHECK}")
    tune.add(commands)
    explain.add(commands)
    words = "write the forward as cubins and C sources, for programs without Python"
    _add_export_options(commands.add_parser("export-kernels", help=words, description=f"{sentence(words)} {_EXPORT}"))
    return parser


def _add_export_options(of_export: argparse.ArgumentParser) -> None:
    of_export.add_argument(
        "--sizes",
        nargs="+",
        required=True,
        metavar="'NAME levels=HxW,... N=... Q=...'",
        help=f"a name and the fields of cupy_msda.Sizes, such as '{export_kernels.EXAMPLE}'",
    )
    of_export.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        help=f"{sizes_argument.DTYPES_HELP} (default: float32)",
    )
    of_export.add_argument("--arch", nargs="+", required=True, help="compute capabilities, such as 8.0 9.0")
    of_export.add_argument("--out", type=Path, required=True, help="folder to write; existing files are replaced")


def _run(options: argparse.Namespace) -> int:
    commands = {
        "demo": _demo, "info": _info, "check": _check, "tune": tune.run, "explain": explain.run,
        "export-kernels": _export_kernels,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # notes, even where the user's settings make them errors
        warnings.showwarning = _note  # restored on leaving
        try:
            return commands[options.command](options)
        except CommandError as error:
            reason = str(error)
        except MemoryError:
            reason = "there is not enough memory"
    complain(f"cupy_msda {options.command}: {reason}")
    return 2


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as the commands show it. Those of other kinds are for developers of this package and of CuPy."""
    if issubclass(category, RuntimeWarning):
        complain(f"cupy_msda: note: {message}")


def _info(_: argparse.Namespace) -> int:
    for name, text in info.describe():
        say(f"{name:20}{text}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    image = Path(options.image)
    if not options.image:
        raise CommandError("expected the name of an image, got nothing")
    path, file_format = picture.target(options.out, image)
    environment.refuse_wrong_variables()
    demo.choose_backend(options.backend)
    scene = demo.make_scene(photograph.load(image))
    outcome, failure = demo.run_on(scene, options.backend)
    if failure is not None:
        complain(f"cupy_msda: note: {failure}; it runs on cpu instead")
    picture.write(scene, outcome, path, file_format)
    say(demo.table(scene, outcome))
    say(f"{'picture':24}{path}")
    return 0


def _check(_: argparse.Namespace) -> int:
    environment.refuse_wrong_variables()
    rows = []
    say(f"{'case':22}{'backend':9}{'dtype':9}{'error':>9}  tolerance  worst output")
    for row in check.run_all():
        failed = "" if row.passed else "  FAILED"
        tolerance = check.TOLERANCE[row.dtype]
        say(f"{row.case:22}{row.backend:9}{row.dtype:9}{row.error:9.1e}  {tolerance:9.0e}  {row.worst}{failed}")
        rows.append(row)
    for backend in check.backends():
        say(f"{'checked':22}{backend.name}: {backend.device}")
    for what in check.not_checked():
        say(f"{'not checked':22}{what}")
    say(check.verdict(rows))
    return 0 if all(row.passed for row in rows) else 1


def _export_kernels(options: argparse.Namespace) -> int:
    for one in export_kernels.export(options.sizes, options.dtypes, options.arch, options.out):
        compiled = ", ".join(f"sm_{cubin.architecture} ({len(cubin.image)} bytes)" for cubin in one.cubins)
        say(f"{f'cupy_msda_{one.name}':40}{compiled}")
    say(f"{'folder':40}{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
