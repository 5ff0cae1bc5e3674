"""The command line: its output and files, and one sentence with exit code 2 for a request that cannot be met."""

import sys

import numpy as np
import pytest

from cupy_msda import __main__, arrays
from cupy_msda.cli import check, demo, photograph


def run(capsys, *arguments):
    try:
        code = __main__.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_demo_writes_a_picture_and_prints_errors_and_times(capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / "out.png"
    code, out, _ = run(capsys, "demo", "--backend", "cpu", "--out", picture)
    assert code == 0
    rows = {line[:24].strip(): line[24:] for line in out.splitlines()}
    assert rows["backend"].startswith("cpu, computed by ")
    assert "171x256" in rows["levels (H x W)"]
    for name in ("output", "grad_value", "grad_locations", "grad_weights"):
        assert float(rows[f"error of {name}"]) < 5e-6
    for name in ("forward", "backward"):
        assert float(rows[name].split()[0]) > 0
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 30


def test_demo_takes_any_image(capsys, tmp_path):
    from PIL import Image

    path = tmp_path / "tall.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 40), np.uint8)).save(path)
    code, out, _ = run(capsys, "demo", path, "--backend", "cpu", "--out", tmp_path / "out.png")
    assert code == 0
    assert "90x40, 45x20, 23x10, 12x5" in out


def test_demo_smooths_the_photograph_along_its_edges():
    scene = demo.make_scene(photograph.load(demo.PHOTOGRAPH))
    outcome = demo.run(scene, "cpu")
    H, W = scene.shapes[0]
    attended = outcome.output.reshape(H, W, demo.HEADS, demo.CHANNELS).mean(2)[..., :3]
    plain = np.abs(scene.photograph - scene.photograph.mean((0, 1))).mean()
    assert np.abs(attended - scene.photograph).mean() < 0.25 * plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "cannot read nowhere.png: No such file"),
        (["{folder}"], "cannot read {folder}: Is a directory"),
        (["{text}"], "{text} is not an image"),
        (["{empty}"], "{empty} is not an image"),
        (["--backend", "tpu"], "invalid choice: 'tpu'"),
        ([""], "expected the name of an image, got nothing"),
        (["{text}/in.png"], "cannot read {text}/in.png: Not a directory"),
    ],
)
def test_demo_refuses_bad_requests(capsys, tmp_path, arguments, words):
    names = {"folder": tmp_path, "text": tmp_path / "text.png", "empty": tmp_path / "empty.jpg"}
    names["text"].write_text("not an image")
    names["empty"].touch()
    code, _, err = run(capsys, "demo", *(a.format(**names) for a in arguments))
    assert code == 2
    assert words.format(**names) in err


@pytest.mark.parametrize("reason", ["CuPy", "GPU"])
def test_demo_says_why_cuda_cannot_be_used(capsys, monkeypatch, reason):
    if reason == "CuPy":
        monkeypatch.setitem(sys.modules, "cupy", None)
        words = "pip install 'cupy-cuda13x>=14.0'"
    else:
        monkeypatch.setattr(arrays, "cuda_unavailable", lambda: "CuPy finds no CUDA device")
        words = "finds no CUDA device"
    code, _, err = run(capsys, "demo", "--backend", "cuda")
    assert code == 2
    assert err.startswith("cupy_msda demo: the backend cuda cannot be used here")
    assert words in err
    assert demo.choose_backend("auto") == "cpu"


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--backend", "cuda", "--out", tmp_path / "out.png")
    assert code == 0
    assert "backend                 cuda" in out


def test_info_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    code, out, _ = run(capsys, "info")
    rows = {line[:20].strip(): line[20:] for line in out.splitlines()}
    assert code == 0
    assert rows["NumPy"] == np.__version__
    assert "pip install" in rows["GPU"]
    assert "kernel cache" in rows


def test_info_has_one_row_of_each_name(capsys):
    _, out, _ = run(capsys, "info")
    names = [line[:24].strip() for line in out.splitlines()]
    assert len(set(names)) == len(names) > 5


def test_without_a_command_the_commands_are_named(capsys):
    code, _, err = run(capsys)
    assert code == 2
    assert "the following arguments are required: command" in err


def test_check_prints_a_row_per_case_backend_and_dtype(capsys):
    code, out, _ = run(capsys, "check")
    assert code == 0
    dtypes = sum(len(check.dtypes_of(backend)) for backend in check.backends())
    rows = [line for line in out.splitlines() if " tolerance " not in line and "checked  " not in line]
    assert len(rows) == dtypes * len(list(check.folder().glob("*.npz"))) + 1  # the verdict


def test_check_fails_where_a_gradient_is_wrong(capsys, monkeypatch, tmp_path):
    for path in check.folder().glob("o*.npz"):
        with np.load(path) as case:
            arrays = dict(case)
        arrays["grad_value"] = arrays["grad_value"] * (1 + 1e-3)
        np.savez(tmp_path / path.name, **arrays)
    monkeypatch.setattr(check, "folder", lambda: tmp_path)
    code, out, _ = run(capsys, "check")
    assert code == 1
    assert "grad_value  FAILED" in out
