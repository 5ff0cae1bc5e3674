"""What `cupy_msda.plot` draws of a record: places, colours, opacities and the sum of a heat map."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cupy_msda import plot

H, W = 30, 40
LEVELS = ((15, 20), (6, 8))
N, Q, M, P = 2, 3, 2, 2
PLAIN = np.zeros((H, W))


def record(seed=0, references=None, **changes):
    """All samples are inside of the image."""
    rng = np.random.default_rng(seed)
    weights = rng.random((N, Q, M, 2, P)) + 0.1
    weights /= weights.sum((-1, -2), keepdims=True)
    fields = {
        "queries": (4, 0, 9),
        "sampling_locations": rng.uniform(0.25, 0.75, (N, Q, M, 2, P, 2)),
        "attention_weights": weights,
        "reference_points": references,
        "spatial_shapes": LEVELS,
        "num_points": (P, P),
        "align_corners": False,
    }
    return SimpleNamespace(**(fields | changes))


def one_sample(location, weight=1.0, levels=LEVELS[:1], **changes):
    return record(
        queries=(0,),
        sampling_locations=np.reshape(location, (1, 1, 1, 1, 1, 2)).astype(float),
        attention_weights=np.reshape(weight, (1, 1, 1, 1, 1)).astype(float),
        spatial_shapes=levels,
        num_points=(1,),
        **changes,
    )


def points_of(*arguments, **options):
    """Positions [K, 2], face colours [K, 4] and edge colours of what is drawn, and the axes."""
    axes = plot.sampling_points(*arguments, **{"axes": Figure().add_subplot()} | options)
    drawn = axes.collections[0]
    return np.asarray(drawn.get_offsets()), drawn.get_facecolors(), drawn.get_edgecolors(), axes


def heat_of(*arguments, **options):
    axes = plot.heat_map(*arguments, **{"axes": Figure().add_subplot()} | options)
    return np.asarray(axes.images[-1].get_array())


def sorted_rows(rows):
    return rows[np.lexsort(rows.T)]


def test_points_lie_where_the_samples_are():
    given = record()
    want = given.sampling_locations[1, 2].reshape(-1, 2) * (W, H) - 0.5
    positions = points_of(given, PLAIN, 9, batch=1)[0]
    np.testing.assert_allclose(sorted_rows(positions), sorted_rows(want))


def test_one_head_is_drawn_where_it_is_chosen():
    given = record()
    want = given.sampling_locations[0, 1, 1].reshape(-1, 2) * (W, H) - 0.5
    positions = points_of(given, PLAIN, 0, head=1)[0]
    np.testing.assert_allclose(sorted_rows(positions), sorted_rows(want))


def test_a_colour_is_a_level_and_the_opacity_a_weight():
    given = record()
    positions, faces, edges, _ = points_of(given, PLAIN, 4)
    pixels = given.sampling_locations[0, 0] * (W, H) - 0.5
    weights = given.attention_weights[0, 0]
    for head, level, point in np.ndindex(M, 2, P):
        at = np.linalg.norm(positions - pixels[head, level, point], axis=-1).argmin()
        np.testing.assert_allclose(faces[at, :3], to_rgb(plot._COLOURS[level]))
        opacity = weights[head, level, point] / weights.max()
        np.testing.assert_allclose([faces[at, 3], edges[at, 3]], [opacity, opacity])


def test_large_weights_are_drawn_last():
    assert (np.diff(points_of(record(), PLAIN, 4)[1][:, 3]) >= 0).all()


def test_fine_levels_are_drawn_over_coarse_ones_of_the_same_weight():
    faces = points_of(record(attention_weights=np.full((N, Q, M, 2, P), 0.25)), PLAIN, 4)[1]
    np.testing.assert_allclose(faces[:4, :3], [to_rgb(plot._COLOURS[1])] * 4)


def test_the_legend_names_the_levels():
    axes = points_of(record(), PLAIN, 4)[-1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["level 0: 15 x 20", "level 1: 6 x 8"]


def test_points_per_level_are_in_the_order_of_the_levels():
    flat = record(
        num_points=(3, 1),
        sampling_locations=np.random.default_rng(1).random((N, Q, M, 4, 2)),
        attention_weights=np.full((N, Q, M, 4), 0.25),
    )
    faces = points_of(flat, PLAIN, 4)[1]
    assert [int(np.isclose(faces[:, :3], to_rgb(c)).all(-1).sum()) for c in plot._COLOURS[:2]] == [3 * M, 1 * M]


def test_more_levels_than_colours_are_drawn():
    L = len(plot._COLOURS) + 1
    many = record(
        num_points=(1,) * L,
        spatial_shapes=((2, 2),) * L,
        sampling_locations=np.full((N, Q, M, L, 1, 2), 0.5),
        attention_weights=np.full((N, Q, M, L, 1), 1 / L),
    )
    assert len(points_of(many, PLAIN, 4)[0]) == M * L


def test_samples_that_are_not_finite_are_left_out():
    given = record()
    given.sampling_locations[0, 0, 0, 0, 0] = np.nan
    given.attention_weights[0, 0, 1, 1, 1] = np.inf
    assert len(points_of(given, PLAIN, 4)[0]) == M * 2 * P - 2
    assert np.isfinite(heat_of(given, PLAIN, 4)).all()


def test_a_query_of_padding_has_no_points():
    empty = record(sampling_locations=np.full((N, Q, M, 2, P, 2), np.nan), attention_weights=np.zeros((N, Q, M, 2, P)))
    assert len(points_of(empty, PLAIN, 4)[0]) == 0
    assert not heat_of(empty, PLAIN, 4).any()


@pytest.mark.parametrize("align_corners", [False, True])
def test_corners_are_those_of_the_call(align_corners):
    """With align_corners 0 is the centre of the first pixel of the level, half a pixel from the edge."""
    (position,) = points_of(one_sample((0, 0), align_corners=align_corners), PLAIN, 0)[0]
    half = 0.5 / np.array([20, 15]) if align_corners else 0
    np.testing.assert_allclose(position, half * np.array([W, H]) - 0.5)


def test_a_reference_point_is_a_cross():
    references = np.full((N, Q, 2, 2), 0.5)
    references[..., 0, 0], references[..., 1, 0] = 0.25, 0.251  # levels with slightly different padding
    lines = points_of(record(references=references), PLAIN, 4)[-1].lines
    np.testing.assert_allclose([line.get_xydata() for line in lines], [[[0.25 * W - 0.5, 0.5 * H - 0.5]]] * 2)


def test_each_level_has_a_cross_where_they_differ():
    references = np.full((N, Q, 2, 2), 0.5)
    references[..., 0, 0], references[..., 1, 0] = 0.2, 0.3
    lines = points_of(record(references=references), PLAIN, 4)[-1].lines
    want = [[[x * W - 0.5, 0.5 * H - 0.5]] for x in (0.2, 0.2, 0.3, 0.3)]
    np.testing.assert_allclose([line.get_xydata() for line in lines], want)


def test_a_list_of_records_is_refused():
    with pytest.raises(TypeError, match=r"record: expected one record, such as records\[0\], got list"):
        plot.sampling_points([record()], np.zeros((H, W)), 4)


def test_a_reference_box_is_a_rectangle():
    references = np.broadcast_to([0.5, 0.4, 0.2, 0.6], (N, Q, 1, 4))
    corners = points_of(record(references=references), PLAIN, 4)[-1].lines[0].get_xydata()
    np.testing.assert_allclose(corners.min(0), (np.array([0.4, 0.1]) * (W, H)) - 0.5)
    np.testing.assert_allclose(corners.max(0), (np.array([0.6, 0.7]) * (W, H)) - 0.5)


def test_the_heat_map_sums_to_the_weights():
    """The size of the image is a multiple of that of each level: triangles add up to 1 everywhere."""
    np.testing.assert_allclose(heat_of(record(), PLAIN, 4).sum(), 1)


def test_all_heads_are_their_mean():
    heads = [heat_of(record(), PLAIN, 4, head=head) for head in range(M)]
    np.testing.assert_allclose(heat_of(record(), PLAIN, 4), sum(heads) / M)


def test_a_level_of_the_size_of_the_image_is_splatted_bilinearly():
    heat = heat_of(one_sample(((7.25 + 0.5) / W, (3.5 + 0.5) / H), 0.8, levels=((H, W),)), PLAIN, 0)
    want = np.zeros((H, W))
    want[3:5, 7:9] = 0.8 * np.array([[0.75, 0.25], [0.75, 0.25]]) / 2
    np.testing.assert_allclose(heat, want, atol=1e-12)


def test_a_coarse_level_spreads_over_two_of_its_pixels():
    """The weight of each pixel is that of the nearest level pixels in a bilinear enlargement."""
    heat = heat_of(one_sample((0.5, 0.5), levels=((15, 20),)), PLAIN, 0)
    rows, columns = np.abs(np.arange(H) - (H / 2 - 0.5)), np.abs(np.arange(W) - (W / 2 - 0.5))
    triangle = [np.maximum(1 - distance / 2, 0) / 2 for distance in (rows, columns)]
    np.testing.assert_allclose(heat, np.outer(*triangle), atol=1e-12)


def test_what_lies_outside_of_the_image_is_missing():
    assert heat_of(one_sample((0, 0.5)), PLAIN, 0).sum() == pytest.approx(0.5)
    assert heat_of(one_sample((3, 0.5)), PLAIN, 0).sum() == 0


def test_a_negative_weight_counts_by_its_size():
    np.testing.assert_allclose(heat_of(one_sample((0.5, 0.5), -0.5), PLAIN, 0).sum(), 0.5)
    np.testing.assert_allclose(points_of(one_sample((0.5, 0.5), -0.5), PLAIN, 0)[1][:, 3], 1)


@pytest.mark.parametrize(
    "image",
    [np.full((H, W, 3), 51, np.uint8), np.full((H, W, 3), 0.2, np.float32), np.full((H, W), 0.2), [[0.2] * W] * H],
    ids=["uint8", "float32", "grey", "list"],
)
def test_images_of_every_kind(image):
    for draw in (plot.sampling_points, plot.heat_map):
        axes = draw(record(), image, 4, axes=Figure().add_subplot())
        shown = np.asarray(axes.images[0].get_array())
        np.testing.assert_allclose(shown, 0.2 * (0.7 if draw is plot.heat_map else 1), rtol=1e-6)
        assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, W - 0.5), (H - 0.5, -0.5))


def test_a_new_figure_is_made_where_no_axes_are_given():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    first, second = (draw(record(), PLAIN, 4) for draw in (plot.sampling_points, plot.heat_map))
    assert first.figure is not second.figure
    for axes in (first, second):
        axes.figure.canvas.draw()
        pyplot.close(axes.figure)


@pytest.mark.parametrize("draw", [plot.sampling_points, plot.heat_map])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PLAIN, 5), {}, ValueError, r"query: expected one of the recorded ones, \[4, 0, 9\], got 5"),
        ((PLAIN, 4), {"batch": 2}, IndexError, "batch: expected an index from 0 to 1, got 2"),
        ((PLAIN, 4), {"head": -1}, IndexError, "head: expected an index from 0 to 1, got -1"),
        ((np.zeros((3, H, W)), 4), {}, ValueError, r"image: expected shape \[H, W, 3\] or \[H, W\], got \[3, 30, 40\]"),
        ((np.zeros((0, W)), 4), {}, ValueError, r"image: expected shape .* got \[0, 40\]"),
    ],
)
def test_wrong_arguments_are_refused(draw, arguments, options, error, message):
    with pytest.raises(error, match=message):
        draw(record(), *arguments, axes=Figure().add_subplot(), **options)


def test_a_long_list_of_queries_is_shortened():
    many = record(queries=tuple(range(1000)))
    with pytest.raises(ValueError, match=r"\[0, 1, ... 999\], got 1000"):
        plot.heat_map(many, PLAIN, 1000)


@pytest.mark.parametrize("draw", [plot.sampling_points, plot.heat_map])
def test_without_matplotlib_the_error_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"cupy_msda.plot needs matplotlib: pip install 'matplotlib>=3.8'"):
        draw(record(), PLAIN, 4)


def test_the_attribute_imports_matplotlib_where_it_draws():
    code = "import cupy_msda, sys; cupy_msda.plot.heat_map; print({'torch', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
