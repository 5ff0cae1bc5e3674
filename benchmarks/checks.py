"""python -m benchmarks.checks: the tests on this machine's GPU, plain and under compute-sanitizer, as a JSON record."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .provenance import provenance

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The files whose tests reach the GPU; the others say nothing more there than on any machine.
ON_THE_GPU = (
    "test_operator.py",
    "test_gpu.py",
    "test_deterministic.py",
    "test_torch.py",
    "test_torch_variants.py",
    "test_torch_operator.py",
    "test_torch_cuda.py",
    "test_golden.py",
    "test_errors.py",
    "test_interop.py",
    "test_readme.py",
    "test_cli.py::test_demo_on_the_gpu",
)
SANITIZED = ("test_operator.py", "test_gpu.py", "test_deterministic.py", "test_torch.py", "test_torch_cuda.py")
# Every array in an allocation of its own: inside a pool the sanitizer takes a neighbour's bytes for ours.
EXACT_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUPY_MSDA_TEST_EXACT_ALLOCATIONS": "1"}


def run(name: str, command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run `command`, keep its output in `log`, and return what it said last."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | environment
    )
    log.write_text(result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    summaries = [line for line in lines if " passed" in line or " failed" in line or "ERROR SUMMARY" in line]
    summaries += [line for line in lines if "RACECHECK SUMMARY" in line]
    print(f"{name}: exit {result.returncode}: {'; '.join(summaries)}", flush=True)
    return {"check": name, "command": command[command.index("-m") :], "exit": result.returncode, "summary": summaries}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checks.json and the logs")
    parser.add_argument("--sanitizer", nargs="*", choices=TOOLS, default=[], help="tools of compute-sanitizer")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Compiling for this machine's CPU says nothing about its GPU, and takes a minute.
    on_the_gpu = [*tests, "-k", "not (test_torch_operator and cpu)", *(f"tests/{name}" for name in ON_THE_GPU)]
    records = [run("tests", on_the_gpu, {}, options.out / "tests.txt")]
    # Without JAX: instrumenting its kernels takes longer than all the rest. Without what needs torch's allocator: CUDA
    # graphs and peak memory.
    suite = [
        *tests,
        "-k",
        "not jax and not graph and not capture and not float32_copies and not fifty and not bounded",
        *(f"tests/{name}" for name in SANITIZED),
    ]
    for tool in options.sanitizer:
        # Our kernels only; but initcheck must also see what others write. There the largest test would take minutes,
        # and the tool itself synchronises.
        chosen, left_out = ["--kernel-name", "kernel_substring=msda_"], []
        if tool == "initcheck":
            chosen = []
            for name in (
                "test_gpu.py::test_more_than_2_31_elements",
                "test_gpu.py::test_nothing_synchronises",
                "test_torch_cuda.py::test_nothing_synchronises",
            ):
                left_out += ["--deselect", f"tests/{name}"]
        sanitizer = ["compute-sanitizer", f"--tool={tool}", *chosen, "--error-exitcode=9"]
        records.append(run(tool, [*sanitizer, *suite, *left_out], EXACT_ALLOCATIONS, options.out / f"{tool}.txt"))
    result = {"provenance": provenance("cuda"), "checks": records}
    (options.out / "checks.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(record["exit"] == 0 for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
