"""The record of several GPUs: what is run again, and the table."""

import json

import pytest

from benchmarks import several_gpus_record


@pytest.fixture
def programs(monkeypatch):
    """The programs that are started, as (module, processes, arguments). Each prints what it is asked for."""
    started = []

    def launched(module, processes, arguments, environment):
        started.append((module, processes, list(arguments)))
        if module == "benchmarks.first_call":
            assert environment["CUPY_CACHE_DIR"]
            seconds = {"first_call_s": 3.0, "second_call_s": 0.001, "largest_difference": 0.0}
            yield {"mode": "first call", "processes": processes, "gpus": 2, "cached_before": 0} | seconds
            return
        for mode in several_gpus_record.MODES:
            if mode in arguments:
                speed = {1: 10.0, 2: 19.0}[processes]
                sizes = {"images_per_process": 2, "size": [64, 96], "gradient_error": 2e-6}
                yield {"mode": mode, "processes": processes, "images_per_second": speed} | sizes

    monkeypatch.setattr(several_gpus_record, "launched", launched)
    return started


def test_what_the_file_has_is_not_run_again(programs, tmp_path, capsys):
    out = tmp_path / "record.json"
    arguments = ["--out", str(out), "--processes", "1", "2", "--", "--small"]
    assert several_gpus_record.main(arguments) == 0
    assert programs == [
        ("benchmarks.several_gpus", 1, ["--modes", "ddp", "fsdp", "compiled", "--small"]),
        ("benchmarks.several_gpus", 2, ["--modes", "ddp", "fsdp", "compiled", "--small"]),
        ("benchmarks.first_call", 8, []),
    ]
    del programs[:]
    content = json.loads(out.read_text())
    content["records"] = [one for one in content["records"] if (one["mode"], one["processes"]) != ("fsdp", 2)]
    out.write_text(json.dumps(content))
    assert several_gpus_record.main(arguments) == 0
    assert programs == [("benchmarks.several_gpus", 2, ["--modes", "fsdp", "--small"])]
    printed = capsys.readouterr().out
    assert "| FSDP2 | 2 | 19.0 | 95% | 2e-06 |" in printed
    assert "The first call of 8 processes at once on 2 GPUs, with 0 kernels in the cache: 3.0 s" in printed


def test_the_tests_for_two_gpus_are_there():
    for node in several_gpus_record.TESTS:
        file, _, name = node.partition("::")
        assert f"def {name}(" in (several_gpus_record.ROOT / file).read_text()


@pytest.mark.parametrize("line", ["3 passed in 12.10s", "=== 1 failed, 2 passed, 4 warnings in 3.1s ==="])
def test_the_last_line_of_pytest_is_kept(line):
    assert several_gpus_record._SUMMARY.match(line)[1].startswith(line.strip("= ")[0])
