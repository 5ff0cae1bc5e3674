"""python -m tests.packaging.run_jobs: the commands of GitHub's jobs, each job in a fresh environment of this machine.

A job is run where its system and its Python are here: in a clone of HEAD, in a new virtual environment, step by step.
Actions other than checkout and setup-python are left out. The machine's own package index replaces the PIP_ variables
of the workflow.

    python -m tests.packaging.run_jobs --list
    python -m tests.packaging.run_jobs "tests/numpy*" "lint/*" --out benchmarks/results/release_jobs.json

Patterns choose jobs by their names in the list. The record keeps the jobs of earlier runs, and names those that have
not been run, with the reason.
"""

import argparse
import fnmatch
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import provenance

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
PACKAGES = ("numpy", "numba", "torch", "jax", "pytest", "setuptools")
KEPT_LINES = 12


@dataclass(frozen=True)
class Job:
    """One job of a workflow, with one choice of its matrix."""

    name: str
    system: str
    python: str | None
    environment: dict[str, str]
    steps: list[dict[str, Any]]


def choices(matrix: dict[str, Any]) -> list[dict[str, str]]:
    """The combinations of a matrix: products of its lists, or the entries of `include`."""
    lists = {key: values for key, values in matrix.items() if key != "include"}
    products = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())] if lists else []
    return [*products, *matrix.get("include", [])] or [{}]


def filled(value: Any, choice: dict[str, str]) -> str:
    """A value of a workflow with the expressions of the matrix replaced."""
    return re.sub(r"\$\{\{ *matrix\.(\w+) *\}\}", lambda match: str(choice[match[1]]), str(value))


def jobs_of(path: Path) -> Iterator[Job]:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, job in workflow["jobs"].items():
        for choice in choices(job.get("strategy", {}).get("matrix", {})):
            words = ", ".join(f"{key} {value or 'newest'}" for key, value in choice.items())
            variables = {**workflow.get("env", {}), **job.get("env", {})}
            python = next(
                (s["with"]["python-version"] for s in job["steps"] if "setup-python" in s.get("uses", "")), None
            )
            yield Job(
                f"{path.stem}/{name}" + (f" ({words})" if words else ""),
                filled(job["runs-on"], choice),
                python and filled(python, choice),
                {key: filled(value, choice) for key, value in variables.items()},
                job["steps"],
            )


def interpreter(version: str) -> str | None:
    """A Python of this version, from pyenv or the search path."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def reason_against(job: Job) -> str | None:
    """Why this machine cannot run a job."""
    if not job.system.startswith("ubuntu"):
        return f"runs on {job.system}"
    if not any("run" in step for step in job.steps):
        return "has actions alone"
    if job.python is None or interpreter(job.python) is None:
        return f"Python {job.python} is not on this machine"
    return None


def variables_of(job: Job, folder: Path) -> dict[str, str]:
    """The environment of a job's commands: that of this machine, without what would lead out of the job's own."""
    own = {key: value for key, value in job.environment.items() if not key.startswith("PIP_")}
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "CUPY_MSDA"))
    }
    path = f"{folder / 'venv' / 'bin'}{os.pathsep}{kept['PATH']}"
    return {**kept, **own, "PATH": path, "CI": "true", "GITHUB_ENV": str(folder / "variables")}


def run_step(step: dict[str, Any], folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Run the command of a step as GitHub's shell does, and read the variables that it leaves."""
    (folder / "variables").write_text("")
    own = {key: str(value) for key, value in step.get("env", {}).items()}
    start = time.time()
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    result = subprocess.run(
        command,
        cwd=folder / "source",
        env={**variables, **own},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    variables.update(line.split("=", 1) for line in (folder / "variables").read_text().splitlines())
    lines = result.stdout.strip().splitlines()
    kept = lines[-1:] if result.returncode == 0 else lines[-KEPT_LINES:]
    return {"run": step["run"], "status": result.returncode, "seconds": round(time.time() - start), "output": kept}


def run_steps(job: Job, folder: Path) -> list[dict[str, Any]]:
    """Run the commands of a job until one fails."""
    variables, steps = variables_of(job, folder), []
    for step in job.steps:
        if "run" in step:
            steps.append(run_step(step, folder, variables))
            if steps[-1]["status"]:
                break
    return steps


def run(job: Job, revision: str) -> dict[str, Any]:
    """Run a job in a clone of the repository and a new environment."""
    with tempfile.TemporaryDirectory(prefix="cupy_msda_job_") as name:
        folder = Path(name)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "source")], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=folder / "source", check=True)
        subprocess.run([interpreter(job.python or ""), "-m", "venv", str(folder / "venv")], check=True)
        steps = run_steps(job, folder)
        version = subprocess.run([folder / "venv" / "bin" / "python", "--version"], capture_output=True, text=True)
        return {
            "passed": not any(step["status"] for step in steps),
            "commit": revision,
            "python": version.stdout.split()[-1],
            "packages": versions_in(folder / "venv" / "bin" / "python"),
            "steps": steps,
        }


def versions_in(python: Path) -> dict[str, str]:
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    return {entry["name"]: entry["version"] for entry in json.loads(listed.stdout) if entry["name"] in PACKAGES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.packaging.run_jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="*", help="which jobs; none: all that this machine can run")
    parser.add_argument("--except", dest="excluded", nargs="+", default=[], metavar="PATTERN", help="jobs to leave out")
    parser.add_argument("--reason", default="not chosen", help="why those jobs are left out, for the record")
    parser.add_argument("--list", action="store_true", help="name all jobs, and why one cannot run")
    parser.add_argument("--out", type=Path, help="JSON record, which is completed where it exists")
    options = parser.parse_args(arguments)
    jobs = [job for path in sorted(WORKFLOWS.glob("*.yml")) for job in jobs_of(path)]
    if options.list:
        print("\n".join(f"{job.name}: {reason_against(job) or 'can run'}" for job in jobs))
        return 0
    old = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    ran, reasons = old.get("jobs", {}), old.get("not_run", {})
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    failed = False
    for job in jobs:
        if any(fnmatch.fnmatch(job.name, pattern) for pattern in options.excluded):
            reasons[job.name] = options.reason
        elif not options.patterns or any(fnmatch.fnmatch(job.name, pattern) for pattern in options.patterns):
            if reason := reason_against(job):
                reasons[job.name] = reason
                continue
            print(f"{job.name} ...", flush=True)
            ran[job.name] = run(job, revision.stdout.strip())
            last = ran[job.name]["steps"][-1]
            print(
                f"  {'passed' if ran[job.name]['passed'] else 'FAILED'}: {last['run']}: {last['output'][-1:]}",
                flush=True,
            )
            failed |= not ran[job.name]["passed"]
            write(options.out, jobs, ran, reasons)
    write(options.out, jobs, ran, reasons)
    return int(failed)


def write(out: Path | None, jobs: list[Job], ran: dict[str, Any], reasons: dict[str, str]) -> None:
    if out is None:
        return
    not_run = {
        job.name: reason_against(job) or reasons.get(job.name, "not chosen") for job in jobs if job.name not in ran
    }
    present = {job.name: ran[job.name] for job in jobs if job.name in ran}
    record = {**provenance("cpu"), "jobs": present, "not_run": not_run}
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
