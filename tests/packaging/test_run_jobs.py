"""``python -m tests.packaging.run_jobs`` reads a workflow and runs its commands as GitHub does."""

import sys

import pytest
import yaml

from tests.packaging import run_jobs

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SETUP = {"uses": "actions/setup-python@v1", "with": {"python-version": "${{ matrix.python }}"}}
PRODUCT = {
    "strategy": {"matrix": {"os": ["ubuntu-latest", "macos-latest"], "python": [VERSION]}},
    "runs-on": "${{ matrix.os }}",
    "env": {"SYSTEM": "on ${{ matrix.os }}"},
    "steps": [
        SETUP,
        {"run": 'echo "LEFT=$SYSTEM" >> "$GITHUB_ENV"'},
        {"run": 'echo "$LEFT, ${PIP_INDEX_URL:-own index}, $STEP"', "env": {"STEP": 1}},
        {"run": "echo first\necho why\nfalse | true"},
        {"run": "echo never"},
    ],
}
INCLUDED = {
    "strategy": {"matrix": {"include": [{"python": "3.98", "numpy": ""}, {"python": "3.99", "numpy": "==2.0"}]}},
    "runs-on": "ubuntu-latest",
    "steps": [SETUP, {"run": "true"}],
}
WORKFLOW = {"env": {"PIP_INDEX_URL": "https://elsewhere"}, "jobs": {"product": PRODUCT, "included": INCLUDED}}


@pytest.fixture
def jobs(tmp_path):
    (tmp_path / "some.yml").write_text(yaml.safe_dump(WORKFLOW, sort_keys=False))
    return list(run_jobs.jobs_of(tmp_path / "some.yml"))


def test_a_matrix_gives_products_and_included_entries(jobs):
    assert [job.name for job in jobs] == [
        f"some/product (os ubuntu-latest, python {VERSION})",
        f"some/product (os macos-latest, python {VERSION})",
        "some/included (python 3.98, numpy newest)",
        "some/included (python 3.99, numpy ==2.0)",
    ]


def test_what_this_machine_cannot_run_has_a_reason(jobs):
    reasons = [run_jobs.reason_against(job) for job in jobs[1:]]
    assert reasons == ["runs on macos-latest", *(f"Python 3.{n} is not on this machine" for n in (98, 99))]


@pytest.fixture
def steps(jobs, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    (tmp_path / "source").mkdir()
    return run_jobs.run_steps(jobs[0], tmp_path)


def test_a_job_ends_with_the_first_command_that_fails(steps):
    assert [step["status"] for step in steps] == [0, 0, 1]
    assert steps[-1]["output"] == ["first", "why"]


def test_variables_reach_the_commands_and_the_machine_keeps_its_index(steps):
    assert steps[1]["output"] == ["on ubuntu-latest, own index, 1"]
