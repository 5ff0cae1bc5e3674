"""A tuning file that is old, foreign, broken or hostile is ignored with one warning. Writers lose no entry."""

import json
import multiprocessing
import os
import random
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cupy_msda import arrays
from cupy_msda.call import ALL, FusedFrontEnd, Problem
from cupy_msda.cuda import gpu
from cupy_msda.cuda.gpu import H100
from cupy_msda.cuda.tuning import file_format, loaded, storage, tuned
from cupy_msda.cuda.tuning.file_format import Key, TuningFile
from cupy_msda.version import __version__
from tests.helpers import drawn_entries, random_problems

NAME = "NVIDIA H100 80GB HBM3"
KEY = Key(__version__, "9.0", 132, 13000)
ENCODER = Problem(2, 750, 8, 32, 2, 4, 750, "float32", "float32", ("cuda", 0), None)


def entries_of(problem=ENCODER, seed=0):
    return list(drawn_entries.choices_of(random.Random(seed), problem, ALL).entries)


@pytest.fixture
def path(monkeypatch, tmp_path):
    """The file of device 0, an H100 that need not be here."""
    runtime = SimpleNamespace(
        getDeviceProperties=lambda device: {"name": NAME.encode()}, driverGetVersion=lambda: KEY.driver
    )
    monkeypatch.setattr(arrays, "require_cupy", lambda what: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(gpu, "of_device", lambda device: H100)
    monkeypatch.setattr(loaded, "_choices", {})
    monkeypatch.setenv(storage.VARIABLE, str(tmp_path))
    return tmp_path / "nvidia_h100_80gb_hbm3.json"


def newly_loaded():
    """What a new process would load, and its warnings."""
    loaded.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [loaded.gpu_of(0).choices.entries for _ in range(3)]
    assert found[0] is found[1] is found[2]
    return found[0], [str(warning.message) for warning in caught]


def test_what_is_stored_is_loaded(path):
    wanted = entries_of()
    assert loaded.store(0, wanted) == path
    found, said = newly_loaded()
    assert {(e.subject, e.sizes): e.axes for e in found} == {(e.subject, e.sizes): e.axes for e in wanted}
    assert not said


@pytest.mark.parametrize("seed", range(30))
def test_text_and_entries_are_the_same(seed):
    problem = random_problems.draw(seed + 1, seed=7)[seed].problem
    contents = TuningFile(NAME, {KEY: entries_of(problem, seed), KEY._replace(driver=12040): []})
    assert file_format.decode(file_format.encode(contents)) == contents


@pytest.mark.parametrize(
    "change",
    [
        {"package": "0.0.1"},
        {"compute_capability": "8.0"},
        {"multiprocessors": 108},
        {"driver": 12040},
    ],
    ids=str,
)
def test_an_old_or_foreign_file_is_ignored_with_one_warning(path, change):
    storage.merge(path, TuningFile(NAME, {KEY._replace(**change): entries_of()}))
    found, said = newly_loaded()
    assert found == ()
    assert len(said) == 1
    assert re.search(r"is ignored: it is for version .*; here is version .*`python -m cupy_msda tune`", said[0])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_ignored_with_one_warning(path, share):
    loaded.store(0, entries_of())
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    found, said = newly_loaded()
    assert found == ()
    assert len(said) == 1
    assert "is ignored (" in said[0]


@pytest.mark.parametrize(
    "contents", [b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"null", b"{}", b"[]", b'{"format": 1}']
)
def test_a_file_of_something_else_is_ignored_with_one_warning(path, contents):
    path.write_bytes(contents)
    found, said = newly_loaded()
    assert found == ()
    assert len(said) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nobody is refused")
def test_a_file_that_cannot_be_read_is_ignored_with_one_warning(path):
    loaded.store(0, entries_of())
    path.chmod(0)
    found, said = newly_loaded()
    assert (found, len(said)) == ((), 1)


HOSTILE = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 2**200, 1e308, -0.5, "", "sorted", "x" * 1000, [], [1], [[]], {},
    {"a": 1}, float("nan"), float("inf"),
)  # fmt: skip


def places_in(tree, path=()):
    """The path of every value in JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield (*path, name)
        yield from places_in(value, (*path, name))


def test_whatever_a_file_says_every_entry_has_allowed_values():
    """Random values in random places: the file is refused, or every entry is one that `tune` could have written."""
    pick, refused = random.Random(0), 0
    fused = replace(ENCODER, fused=FusedFrontEnd(2, 2, "float32", False))
    text = file_format.encode(TuningFile(NAME, {KEY: entries_of() + entries_of(fused)}))
    places = list(places_in(json.loads(text)))
    for _ in range(3000):
        tree = json.loads(text)
        for *parents, last in pick.sample(places, pick.choice((1, 1, 2))):
            at = tree
            try:
                for name in parents:
                    at = at[name]
                if pick.random() < 0.2:
                    del at[last]
                else:
                    at[last] = pick.choice(HOSTILE)
            except (KeyError, IndexError, TypeError):
                continue  # the other change has taken this place away
        try:
            found = file_format.decode(json.dumps(tree))
        except ValueError:
            refused += 1
            continue
        for entry in (entry for entries in found.tuned.values() for entry in entries):
            for axis, value in entry.axes.items():
                assert value in tuned.AXES[entry.subject.name][axis]
                assert type(value) is not bool
            ordered = tuned.ORDERED.get(entry.subject.name, ())
            assert not (entry.subject.deterministic and set(entry.axes) & set(ordered))
            assert all(0 < size < 2**48 for size in entry.sizes)
    assert 2000 < refused < 3000


@pytest.mark.parametrize("setting", ["off", "OFF", "0"])
def test_switched_off_nothing_is_read_or_written(path, monkeypatch, setting):
    loaded.store(0, entries_of())
    before = path.read_text()
    monkeypatch.setenv(storage.VARIABLE, setting)
    assert newly_loaded() == ((), [])
    assert loaded.store(0, entries_of(seed=1)) is None
    assert loaded.gpu_of(0).choices.entries  # of this process
    assert path.read_text() == before


def test_the_default_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert storage.path_of("Tesla T4") == tmp_path / ".cupy_msda" / "tuning" / "tesla_t4.json"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "", "NVIDIA\x00", "C:\\x"])
def test_a_name_of_a_gpu_stays_in_the_folder(path, name):
    assert storage.path_of(name).parent == path.parent


def write(folder, number):
    """Adds 20 entries, one after the other."""
    path = folder / "gpu.json"
    for seed in range(20):
        problem = Problem(1 + number, 750 + seed, 8, 32, 2, 4, 300, "float32", "float32", ("cuda", 0), None)
        storage.merge(path, TuningFile("gpu", {KEY: entries_of(problem)[:1]}))
        storage.read(path)  # whole at any time


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(storage.read(tmp_path / "gpu.json").tuned[KEY]) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_lock_that_a_dead_process_has_left_is_taken_over(path):
    lock = path.with_suffix(".lock")
    lock.touch()
    os.utime(lock, (1, 1))
    loaded.store(0, entries_of())
    assert path.exists()
    assert not lock.exists()


def test_an_entry_replaces_that_of_the_same_problem(path):
    for seed in (0, 1):
        loaded.store(0, entries_of(seed=seed))
    found, _ = newly_loaded()
    last = {(e.subject, e.sizes): e.axes for e in entries_of(seed=1)}
    assert {(e.subject, e.sizes): e.axes for e in found} == last


def test_a_folder_that_cannot_be_written_says_so(path, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(storage.VARIABLE, str(file / "folder"))
    with pytest.raises(NotADirectoryError):
        loaded.store(0, entries_of())
