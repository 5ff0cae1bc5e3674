"""The command line: ``python -m cupy_msda demo | info | check``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cli import check, demo, info


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0 for success, 1 for a check that fails, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m cupy_msda", description="Multi-scale deformable attention")
    commands = parser.add_subparsers(dest="command", required=True)
    of_demo = commands.add_parser("demo", help="run the operator on a photograph, forward and backward, and draw it")
    of_demo.add_argument("image", nargs="?", type=Path, default=demo.PHOTOGRAPH, help="any image that Pillow reads")
    of_demo.add_argument("--out", type=Path, default=Path("msda_demo.png"), help="picture to write (msda_demo.png)")
    of_demo.add_argument("--backend", choices=("auto", "cpu", "cuda"), default="auto")
    commands.add_parser("info", help="print versions, GPU, kernel cache, and what is missing")
    commands.add_parser("check", help="run the golden cases on every backend of this machine")
    options = parser.parse_args(arguments)

    if options.command == "info":
        for name, text in info.describe():
            print(f"{name:20}{text}")
        return 0
    return _check() if options.command == "check" else _demo(options)


def _demo(options: argparse.Namespace) -> int:
    try:
        backend = demo.choose_backend(options.backend)
        scene = demo.make_scene(demo.load_photograph(options.image))
        outcome = demo.run(scene, backend)
        demo.draw(scene, outcome, options.out)
    except demo.DemoError as error:
        print(f"cupy_msda demo: {error}", file=sys.stderr)
        return 2
    print(demo.table(scene, outcome))
    print(f"{'picture':24}{options.out}")
    return 0


def _check() -> int:
    failed = 0
    print(f"{'case':22}{'backend':9}{'dtype':9}{'error':>9}  tolerance  worst output")
    for row in check.run_all():
        verdict = "" if row.passed else "  FAILED"
        tolerance = check.TOLERANCE[row.dtype]
        print(f"{row.case:22}{row.backend:9}{row.dtype:9}{row.error:9.1e}  {tolerance:9.0e}  {row.worst}{verdict}")
        failed += not row.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
