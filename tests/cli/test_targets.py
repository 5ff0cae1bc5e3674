"""What the demo may write to: the name that it prints is the file that it wrote; anything else is refused first."""

import os

import numpy as np
import pytest

from cupy_msda import __main__
from cupy_msda.cli import demo, photograph, picture
from cupy_msda.cli.output import CommandError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).save(path)
    return path


def run(capsys, *arguments):
    code = __main__.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("name", "written_as"),
    [("a.png", "PNG"), ("a", "PNG"), ("a.b.JPG", "JPEG"), (".png", "PNG"), ("ä ö.webp", "WEBP"), ("-x.tiff", "TIFF")],
)
def test_the_printed_name_is_the_file(capsys, tmp_path, image, name, written_as):
    code, out, _ = run(capsys, "demo", image, "--backend", "cpu", f"--out={tmp_path / name}")
    assert code == 0
    printed = out.splitlines()[-1][24:]
    assert printed == str(tmp_path / name)
    with Image.open(printed) as drawn:
        assert drawn.format == written_as
    assert len(list(tmp_path.iterdir())) == 2


def test_an_existing_picture_is_replaced(capsys, tmp_path, image):
    (tmp_path / "old.png").write_text("old")
    assert run(capsys, "demo", image, "--backend", "cpu", "--out", tmp_path / "old.png")[0] == 0
    assert (tmp_path / "old.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_work(monkeypatch):
    """Fails where the demo begins to work."""

    def begun(*_):
        raise AssertionError("refuse first")

    monkeypatch.setattr(photograph, "load", begun)


REFUSED = [
    ("", "expected the name of a file, got nothing"),
    ("{folder}", "expected the name of a file, got the folder {folder}"),
    ("{folder}/new/", "expected the name of a file, got the folder {folder}/new/"),
    ("{folder}/link_to_folder", "got the folder {folder}/link_to_folder"),
    ("{folder}/no/such/a.png", "there is no folder {folder}/no/such"),
    ("{image}/a.png", "there is no folder {image}"),
    ("{image}", "{image} is the image itself"),
    ("{folder}/./in.png", "is the image itself"),
    ("{folder}/link.png", "{folder}/link.png is the image itself"),
    ("{folder}/hard.png", "{folder}/hard.png is the image itself"),
    ("{folder}/a.xyz", "expected a name without a suffix (PNG) or with one of "),
    ("{folder}/a.v2", "got {folder}/a.v2"),
    ("{folder}/" + 300 * "a", "File name too long"),
    ("{folder}/a\0b", "embedded null"),
    ("{folder}/loop", "symbolic links"),
    ("{folder}/dangling", "there is no folder /no/such"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_what_is_no_new_picture_is_refused_before_the_work(capsys, tmp_path, image, name, words):
    (tmp_path / "link.png").symlink_to(image)
    (tmp_path / "link_to_folder").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("/no/such/folder.png")
    os.link(image, tmp_path / "hard.png")
    before = image.read_bytes()
    names = {"folder": tmp_path, "image": image}
    code, out, err = run(capsys, "demo", image, f"--out={name.format(**names)}")
    assert (code, out) == (2, "")
    assert err.startswith("cupy_msda demo: --out: ")
    assert words.format(**names) in err
    assert err.count("\n") == 1
    assert image.read_bytes() == before


@pytest.mark.usefixtures("no_work")
def test_the_photograph_of_the_package_is_not_overwritten(capsys):
    code, _, err = run(capsys, "demo", "--out", demo.PHOTOGRAPH)
    assert code == 2
    assert "is the image itself" in err


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("refused", ["file", "folder"])
def test_what_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, image, monkeypatch, refused):
    target = tmp_path / "old.png"
    if refused == "file":
        target.touch()
    writable = str(target if refused == "file" else tmp_path.resolve())
    monkeypatch.setattr(os, "access", lambda path, mode: path != writable)  # root may write everywhere
    code, _, err = run(capsys, "demo", image, "--out", target)
    assert code == 2
    assert f"cannot write to {target}: Permission denied" in err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, image, monkeypatch):
    scene = demo.make_scene(photograph.load(image))
    outcome = demo.run(scene, "cpu")
    (tmp_path / "old.png").write_text("old")

    def fails(*_):
        raise ValueError("a setting\nof matplotlib")

    monkeypatch.setattr(picture, "_draw", fails)
    with pytest.raises(CommandError, match="cannot draw a picture of format png: a setting of matplotlib"):
        picture.write(scene, outcome, tmp_path / "old.png", "png")
    assert (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize("shape", [(500, 1), (1, 500), (1, 1), (256, 20), (9, 90), (60, 45)])
def test_the_picture_is_bounded(capsys, tmp_path, shape):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, shape, np.uint8)).save(tmp_path / "in.png")
    code, out, _ = run(capsys, "demo", tmp_path / "in.png", "--backend", "cpu", "--out", tmp_path / "out.png")
    assert code == 0
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width == picture.WIDTH * picture.DOTS
        assert 400 < drawn.height <= picture.HEIGHT * picture.DOTS
        assert np.asarray(drawn.convert("L")).std() > 5
    assert all(float(line[24:]) < 5e-6 for line in out.splitlines() if line.startswith("error of"))
