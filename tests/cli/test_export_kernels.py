"""``python -m cupy_msda export-kernels``: what it writes, and what it refuses."""

import re

import pytest

from cupy_msda import Sizes
from cupy_msda.__main__ import main
from cupy_msda.cli import export_kernels

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
DECODER = "decoder levels=6x7,3x4 N=2 Q=5"


def run(capsys, *arguments):
    try:
        code = main(["export-kernels", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_writes_sources_and_a_cubin_of_each_architecture(capsys, tmp_path):
    out = tmp_path / "deep" / "folder"
    dtypes = ["float32", "float16/float32"]
    code, printed, _ = run(capsys, "--sizes", DECODER, "--dtypes", *dtypes, "--arch", "sm_80", "90", "--out", out)
    assert code == 0
    cubins = {f"decoder_{dtype}.sm_{arch}.cubin" for dtype in ("float32", "float16_float32") for arch in (80, 90)}
    sources = {f"cupy_msda_{name}" for name in ("launch.h", "launch.c", "kernels.h", "kernels.c")}
    assert {path.name for path in out.iterdir()} == cubins | sources
    assert all((out / name).read_bytes().startswith(b"\x7fELF") for name in cubins)
    assert "cupy_msda_decoder_float16_float32" in printed
    header = (out / "cupy_msda_kernels.h").read_text()
    assert "extern const cupy_msda_configuration cupy_msda_decoder_float32;" in header
    assert "N = 2, S = 54, Q = 5" in header


def test_sizes_have_the_fields_of_the_class():
    text = (
        "dfine levels=8x8,4x4 N=3 Q=7 M=4 D=16 num_points=3,6 interpolation=bilinear padding_mode=border "
        "align_corners=true ragged reference_coordinates=4 one_reference=true packed=true"
    )
    want = Sizes(
        levels=((8, 8), (4, 4)), N=3, Q=7, M=4, D=16, num_points=(3, 6), interpolation="bilinear",
        padding_mode="border", align_corners=True, ragged=True, reference_coordinates=4, one_reference=True,
        packed=True,
    )  # fmt: skip
    assert export_kernels.read_sizes(text) == ("dfine", want)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (["levels=6x7"], "expected a name of a-z, 0-9 and _ first"),
        ([""], "expected a name of a-z, 0-9 and _ first"),
        (["Decoder levels=6x7"], "expected a name of a-z, 0-9 and _ first"),
        (["decoder N=2"], "expected sizes as 'levels="),
        (["decoder levels=6"], "got 'levels=6'"),
        (["decoder levels=6x7 N=two"], "got 'N=two'"),
        (["decoder levels=6x7 N=-1"], "got 'N=-1'"),
        (["decoder levels=6x7 N=1 N=2"], "expected N once"),
        (["decoder levels=6x7 ragged=yes"], "got 'ragged=yes'"),
        (["decoder levels=6x7 heads=8"], "expected levels, N, Q"),
        (["decoder levels=0x7"], "expected levels of positive (H, W)"),
        (["decoder levels=6x7 N=0"], "expected sizes of at least 1 in decoder_float32"),
        (["decoder levels=6x7 packed=true"], "reference_coordinates: expected 2 or 4"),
        (["decoder levels=6x7 interpolation=cubic"], "interpolation: expected"),
        ([DECODER, DECODER], "expected names that differ"),
    ],
)
def test_sizes_that_are_none_are_refused(capsys, tmp_path, sizes, words):
    code, _, err = run(capsys, "--sizes", *sizes, "--arch", 90, "--out", tmp_path / "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["int8", "float16/bfloat16", "float64/float32", "float32/"])
def test_dtypes_that_are_none_are_refused(capsys, tmp_path, dtype):
    code, _, err = run(capsys, "--sizes", DECODER, "--dtypes", dtype, "--arch", 90, "--out", tmp_path)
    assert code == 2
    assert "--dtypes: expected float16, bfloat16, float32, float64, float16/float32" in err


def test_architectures_that_are_none_are_refused(capsys, tmp_path):
    code, _, err = run(capsys, "--sizes", DECODER, "--arch", 90, 61, "--out", tmp_path)
    assert code == 2
    assert "--arch: a GPU of compute capability 6.1 is too old: expected 7.5 or newer" in err
    code, _, err = run(capsys, "--sizes", DECODER, "--arch", 90, "ninety", "--out", tmp_path)
    assert code == 2
    assert "--arch: expected a compute capability such as 8.6, 86 or sm_86, got 'ninety'" in err


def test_an_architecture_that_is_not_listed_takes_the_choices_of_the_nearest(capsys, tmp_path):
    code, printed, _ = run(capsys, "--sizes", DECODER, "--arch", "10.0", "10.3", "--out", tmp_path)
    assert code == 0
    assert re.search(r"sm_100 \(\d+ bytes\), sm_103 \(\d+ bytes\)", printed)


def test_a_folder_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run(capsys, "--sizes", DECODER, "--arch", 90, "--out", tmp_path / "file")
    assert code == 2
    assert f"cannot write into {tmp_path / 'file'}: File exists" in err
