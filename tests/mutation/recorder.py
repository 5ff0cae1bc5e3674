"""A pytest plugin that records what each test reaches: Python lines, and kernels of the emulator; and its seconds.

`python -m pytest -p tests.mutation.recorder` with CUPY_MSDA_REACHED set to a folder, to which each process writes.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import coverage
import pytest

from cupy_msda.cuda import kernels
from tests.helpers import emulator

from .mutant import ROOT


class Recorder:
    """The lines by coverage's contexts, of which each test is one."""

    def __init__(self, folder: Path) -> None:
        self.name = folder / f"{os.getpid()}-{time.time_ns()}"
        self.coverage = coverage.Coverage(f"{self.name}.lines", source=[str(ROOT / "cupy_msda")], config_file=False)
        self.coverage.start()
        self.test = ""
        self.seconds: dict[str, float] = {}
        self.kernels: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
        self._record_builds()

    def _record_builds(self) -> None:
        build = emulator.build

        def recorded(spec, text=None, sanitize=False, **options):
            target = build(spec, text, sanitize, **options)
            if text is None:
                self.kernels[self.test][str(target)] = spec.kernel, kernels.prelude(spec).count("\n")
            return target

        emulator.build = recorded

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test, begin = item.nodeid, time.monotonic()
        self.coverage.switch_context(self.test)
        yield
        self.coverage.switch_context("")
        self.seconds[self.test] = time.monotonic() - begin

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        found = {"seconds": self.seconds, "kernels": self.kernels}
        Path(f"{self.name}.json").write_text(json.dumps(found))


def pytest_configure(config) -> None:
    if os.environ.get("CUPY_MSDA_REACHED") and (hasattr(config, "workerinput") or not config.option.numprocesses):
        config.pluginmanager.register(Recorder(Path(os.environ["CUPY_MSDA_REACHED"])))
