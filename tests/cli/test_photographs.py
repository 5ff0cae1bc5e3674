"""Any image that Pillow reads becomes an upright RGB photograph on white, of bounded size, or a sentence refuses it."""

import io

import numpy as np
import pytest

from cupy_msda.cli import photograph
from cupy_msda.cli.output import CommandError

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow gives up
# The modes that Pillow writes in a format without changing their values.
MODES = {
    "png": "1 L LA P RGB RGBA I I;16 I;16B",
    "tiff": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB I I;16 I;16B F",
    "im": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr I I;16 I;16B F",
    "gif": "1 L LA P RGB RGBA",
    "bmp": "1 L P RGB RGBA",
    "jpeg": "1 L RGB RGBX CMYK YCbCr",
    "webp": "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB",
    "ppm": "1 L RGB RGBA I I;16 F",
    "tga": "1 L LA P RGB RGBA",
    "jpeg2000": "L LA RGB RGBA CMYK YCbCr I;16 I;16B",
}
SHAPES = ((1, 1), (1, 700), (900, 1), (3, 5000), (97, 61), (256, 256), (300, 700))  # (H, W)


def smooth(shape, seed):
    """Colours that change slowly, so that a format that loses details still keeps them."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[: shape[0], : shape[1]]
    waves = [np.sin(2 * np.pi * (y / (shape[0] + 9) + x / (shape[1] + 9)) + phase) for phase in rng.uniform(0, 6, 3)]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def in_mode(mode, colours):
    image = Image.fromarray(colours)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    grey = np.asarray(image.convert("L"))
    if mode.startswith("I;16"):
        return Image.fromarray(grey.astype(np.uint16) * 257).convert(mode) if mode == "I;16" else _big_endian(grey)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)


def _big_endian(grey):
    return Image.frombytes("I;16B", grey.shape[::-1], (grey.astype(">u2") * 257).astype(">u2").tobytes())


def expected(mode, colours):
    """The same colours at full size, by Pillow; grey where the mode has no colours."""
    if mode in ("I", "F") or mode.startswith("I;16"):
        mode = "L"
    image = Image.fromarray(colours)
    return np.asarray((image if mode == "LAB" else image.convert(mode)).convert("RGB"), np.float64) / 255


@pytest.mark.parametrize(("file_format", "mode"), [(name, mode) for name in MODES for mode in MODES[name].split()])
def test_every_mode_and_shape_keeps_its_colours_and_its_aspect(tmp_path, mode, file_format):
    written = 0
    for seed, (H, W) in enumerate(SHAPES):
        colours, path = smooth((H, W), seed), tmp_path / f"{seed}.{file_format}"
        try:
            in_mode(mode, colours).save(path, file_format)
        except (OSError, KeyError, ValueError, SystemError):  # Pillow does not write this
            continue
        written += 1
        found = photograph.load(path)
        h, w = found.shape[:2]
        assert max(h, w) == min(256, max(H, W))
        assert abs(h * W - w * H) <= max(H, W)  # less than a pixel from the aspect of the file
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.abs(found.mean((0, 1)) - expected(mode, colours).mean((0, 1))).max() < 0.04
        if (h, w) == (H, W) and mode not in ("1", "P", "PA"):  # these are dithered
            assert np.abs(found - expected(mode, colours)).mean() < 0.04
    if not written:
        pytest.skip(f"Pillow writes no {mode} as {file_format}")


def grey(path):
    found = photograph.load(path)
    assert np.ptp(found, -1).max() == 0
    return found[..., 0]


RAMP = np.linspace(0, 1, 60).reshape(5, 12)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (RAMP * 65535, RAMP),  # 16 bits
        (RAMP * 4095, RAMP),  # 12 bits of a camera
        (RAMP * 255, RAMP),
        (RAMP, RAMP),
        (RAMP * 1e-3, RAMP),
        (RAMP * 1e7 - 3e6, RAMP),  # elevations, say
        (RAMP * 40000, RAMP * 40000 / 65535),  # a dark photograph stays dark
        (np.where(RAMP > 0.5, np.nan, RAMP), np.where(RAMP > 0.5, 1, RAMP)),  # nothing there, as with transparency
        (np.where(RAMP > 0.5, np.inf, RAMP), np.where(RAMP > 0.5, 1, RAMP)),
        (np.full((5, 12), np.nan), np.ones((5, 12))),
        (np.zeros((5, 12)), np.zeros((5, 12))),
    ],
)
def test_floating_point_is_shown_by_its_range(tmp_path, values, shown):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tiff")
    np.testing.assert_allclose(grey(tmp_path / "f.tiff"), shown, atol=2e-3)


@pytest.mark.parametrize("bits", [16, 12])
def test_deep_grey_is_not_white(tmp_path, bits):
    values = np.rint(RAMP * (2**bits - 1)).astype(np.uint16)
    for name in ("d.png", "d.tiff", "d.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_allclose(grey(tmp_path / name), RAMP, atol=2e-3)


def test_deep_grey_is_averaged_when_it_becomes_smaller(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (1024, 2048)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    means = values.reshape(128, 8, 256, 8).mean((1, 3)) / 65535
    np.testing.assert_allclose(grey(tmp_path / "d.png"), means, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("deep", [False, True])
def test_exif_rotation_is_applied_once(tmp_path, file_format, orientation, deep):
    from PIL import ImageOps

    if deep and file_format in ("jpeg", "webp"):
        pytest.skip("this format has 8 bits")
    corner = np.zeros((32, 48), np.uint16 if deep else np.uint8)
    corner[:16, :24] = 65535 if deep else 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"e.{file_format}"
    Image.fromarray(corner).save(path, file_format, exif=exif)
    plain = Image.fromarray((corner > 0).astype(np.uint8) * 255)
    plain.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(plain))
    np.testing.assert_allclose(grey(path), upright / 255, atol=0.05)


def test_damaged_exif_does_not_matter(tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "e.jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert photograph.load(tmp_path / "e.jpeg").shape == (7, 9, 3)


def transparent_images(tmp_path):
    """The left half is transparent and hides red; the right half is blue."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4], rgba[:, 4:] = (255, 0, 0, 0), (0, 0, 255, 255)
    image = Image.fromarray(rgba)
    for name in ("t.png", "t.webp", "t.tiff", "t.tga"):
        image.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "t.webp" else {}))
    image.convert("RGB").save(tmp_path / "colour_key.png", transparency=(255, 0, 0))
    palette = image.convert("RGB").quantize(2)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((0, 0)))
    return sorted(tmp_path.iterdir())


def test_transparent_pixels_are_white(tmp_path):
    for path in transparent_images(tmp_path):
        found = photograph.load(path)
        assert np.abs(found[:, :4] - 1).max() < 0.02, path.name
        assert np.abs(found[:, 4:] - (0, 0, 1)).max() < 0.02, path.name


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_a_transparent_grey_is_white(tmp_path, mode):
    values = np.full((8, 8), 40000 if mode == "I;16" else 200, np.uint16 if mode == "I;16" else np.uint8)
    values[:, :4] = 0
    Image.fromarray(values).convert(mode).save(tmp_path / "t.png", transparency=0)
    found = grey(tmp_path / "t.png")
    assert np.abs(found[:, :4] - 1).max() < 0.01
    assert found[:, 4:].max() == (1 if mode == "1" else pytest.approx(40000 / 65535 if mode == "I;16" else 200 / 255))


def test_half_transparent_colours_are_mixed_with_white_and_hide_their_neighbours(tmp_path):
    rgba = np.zeros((512, 512, 4), np.uint8)
    rgba[...] = (0, 0, 255, 255)
    rgba[::2] = (255, 0, 0, 0)
    Image.fromarray(rgba).save(tmp_path / "t.png")
    inside = photograph.load(tmp_path / "t.png")[8:-8]
    assert np.abs(inside - (0.5, 0.5, 1)).max() < 0.02


def test_the_first_frame_of_an_animation_is_shown(tmp_path):
    red, blue = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
        assert np.abs(photograph.load(tmp_path / name) - (1, 0, 0)).max() < 0.03, name


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "I;16"])
def test_too_many_pixels_are_refused(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(photograph, "MAX_PIXELS", 100)
    before = Image.MAX_IMAGE_PIXELS
    for size, fits in (((10, 10), True), ((101, 1), False), ((50, 50), False)):
        Image.new(mode, size).save(tmp_path / "m.png")
        if fits:
            assert photograph.load(tmp_path / "m.png").shape == (10, 10, 3)
            continue
        with pytest.raises(CommandError, match=r"m\.png has more than 100 pixels"):
            photograph.load(tmp_path / "m.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_what_takes_no_memory_to_write_takes_little_to_refuse(tmp_path):
    """A file of a few bytes that claims 4 * 10^9 pixels."""
    header = io.BytesIO()
    Image.new("L", (1, 1)).save(header, "bmp")
    claims = bytearray(header.getvalue())
    claims[18:26] = (65536).to_bytes(4, "little") * 2
    (tmp_path / "claims.bmp").write_bytes(claims)
    with pytest.raises(CommandError, match="more than 128,000,000 pixels"):
        photograph.load(tmp_path / "claims.bmp")


def photograph_or_sentence(path):
    try:
        return photograph.load(path)
    except CommandError as error:
        return str(error)


@pytest.mark.parametrize("file_format", ["png", "gif", "tiff", "jpeg", "bmp", "webp", "ppm", "tga", "ico", "im"])
def test_a_damaged_file_is_an_image_or_a_sentence(tmp_path, file_format):
    rng = np.random.default_rng(len(file_format))
    buffer = io.BytesIO()
    Image.fromarray(smooth((40, 30), 1)).convert("P" if file_format in ("gif", "png") else "RGB").save(
        buffer, file_format
    )
    whole, path = buffer.getvalue(), tmp_path / f"d.{file_format}"
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(len(damaged), rng.choice([40, 10**6])), rng.integers(1, 9)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        found = photograph_or_sentence(path)
        if isinstance(found, str):
            assert "\n" not in found
            assert path.name in found
        else:
            assert np.isfinite(found).all()
            assert 0 < found.size <= 3 * 256 * 256
