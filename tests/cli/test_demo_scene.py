"""What the demo computes and draws, against its words: pyramid, samples, weights, loss and picture."""

from itertools import pairwise

import numpy as np
import pytest

from cupy_msda.cli import demo, picture

H, W = 21, 34
COLOURS = ["#ffd92f", "#4daf4a", "#377eb8", "#e41a1c"]


@pytest.fixture(scope="module")
def scene():
    """Smooth, and other in its rows than in its columns."""
    y, x = np.mgrid[:H, :W]
    image = np.stack((x / W, (y / H) ** 2, 0.5 + 0.4 * np.sin(0.2 * x + 0.5 * y)), -1)
    return demo.make_scene(image)


@pytest.fixture(scope="module")
def outcome(scene):
    return demo.run(scene, "cpu")


@pytest.fixture(scope="module")
def axes(scene, outcome):
    return picture._draw(scene, outcome).axes


def start_of(scene, level):
    return sum(h * w for h, w in scene.shapes[:level])


def test_each_level_averages_four_pixels_of_the_one_before(scene):
    assert scene.shapes == [(21, 34), (11, 17), (6, 9), (3, 5)]
    levels = [
        scene.value[0, start_of(scene, i) : start_of(scene, i + 1), 0, :3].reshape(h, w, 3)
        for i, (h, w) in enumerate(scene.shapes)
    ]
    np.testing.assert_allclose(levels[0], scene.photograph, atol=1e-6)
    for fine, coarse in pairwise(levels):
        for y, x in ((0, 0), (1, 2), (coarse.shape[0] - 1, coarse.shape[1] - 1)):
            np.testing.assert_allclose(coarse[y, x], _mean_of_four(fine, y, x), atol=1e-6)


def _mean_of_four(image, y, x):
    """The last row and column count twice where there is no other."""
    rows, columns = (np.minimum([2 * at, 2 * at + 1], n - 1) for at, n in ((y, image.shape[0]), (x, image.shape[1])))
    return image[np.ix_(rows, columns)].mean((0, 1))


def test_channels_are_colour_luminance_its_slopes_and_a_constant(scene):
    value = scene.value[0, : H * W].reshape(H, W, demo.HEADS, demo.CHANNELS)
    luminance = scene.photograph.mean(-1)
    slopes = [np.gradient(luminance, axis=axis) for axis in (0, 1)]
    want = np.stack((luminance, *slopes, np.hypot(*slopes), np.ones((H, W))), -1)
    for head in range(demo.HEADS):
        np.testing.assert_allclose(value[:, :, head, 3:], want, atol=1e-6)


def test_heads_look_along_and_across_the_edge_in_steps_of_pixels(scene):
    y, x = 10, 17
    luminance = scene.photograph.mean(-1)
    gy, gx = (np.gradient(luminance, axis=axis)[y, x] for axis in (0, 1))
    pixels = scene.locations[0, y * W + x] * np.array([(w, h) for h, w in scene.shapes])[:, None]
    own = np.array([((x + 0.5) / W * w, (y + 0.5) / H * h) for h, w in scene.shapes])
    offsets = pixels[:, 0] - own[0]  # of the finest level [M, P, 2]
    distance = np.linalg.norm(offsets, axis=-1)
    np.testing.assert_allclose(distance, np.tile(1.3 * np.arange(1, 5), (4, 1)), rtol=1e-4)
    direction = offsets / distance[..., None]
    right_angles = np.arctan2(gy, gx) + np.arange(4) * np.pi / 2
    want = np.stack((np.cos(right_angles), np.sin(right_angles)), -1)
    np.testing.assert_allclose(direction, np.repeat(want[:, None], 4, 1), atol=1e-3)


def test_samples_stay_inside_the_outermost_pixel_centres(scene):
    size = np.array([(w, h) for h, w in scene.shapes])[:, None]
    pixels = scene.locations[0] * size
    assert (pixels >= 0.51 - 1e-4).all()
    assert (pixels <= size - 0.51 + 1e-4).all()


def test_weights_are_a_softmax_by_colour_and_level(scene):
    weights = scene.weights[0].reshape(H * W, demo.HEADS, -1)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    query, head = 300, 2
    logits = np.zeros((demo.LEVELS, demo.POINTS))
    for level, (h, w) in enumerate(scene.shapes):
        image = scene.value[0, start_of(scene, level) :, 0, :3]
        for point in range(demo.POINTS):
            x, y = (scene.locations[0, query, head, level, point] * (w, h)).astype(int)
            distance = ((image[y * w + x] - scene.photograph.reshape(-1, 3)[query]) ** 2).sum()
            logits[level, point] = -distance / 0.15**2 - 0.5 * level
    want = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(scene.weights[0, query, head], want, rtol=1e-3, atol=1e-6)


def attended(outcome):
    return outcome.output.reshape(H, W, demo.HEADS, demo.CHANNELS).mean(2)[..., :3]


def test_the_gradient_is_that_of_half_the_squared_distance(scene, outcome):
    grad = demo._grad_output(scene, outcome.output).reshape(H, W, demo.HEADS, demo.CHANNELS)
    want = (attended(outcome) - scene.photograph) / demo.HEADS
    for head in range(demo.HEADS):
        np.testing.assert_allclose(grad[:, :, head, :3], want, atol=1e-6)
    assert not grad[..., 3:].any()


def test_the_panels_show_samples_output_loss_and_gradient(scene, outcome, axes):
    np.testing.assert_allclose(axes[0].images[0].get_array(), scene.photograph)
    np.testing.assert_allclose(axes[1].images[0].get_array(), np.clip(attended(outcome), 0, 1), atol=1e-6)
    loss = np.abs(attended(outcome) - scene.photograph).mean(-1)
    np.testing.assert_allclose(axes[2].images[0].get_array(), loss, atol=1e-6)
    assert axes[2].images[0].get_clim() == (0, pytest.approx(max(loss.max(), 1 / 255)))
    assert axes[3].images[0].get_clim()[0] == 0


def test_the_gradient_of_all_levels_is_per_pixel_of_the_finest(scene, outcome, axes):
    want = np.zeros((H, W))
    for level, (h, w) in enumerate(scene.shapes):
        part = outcome.grad_value[0, start_of(scene, level) : start_of(scene, level + 1)].sum(1)[:, :3]
        part = np.abs(part).sum(-1).reshape(h, w)
        for y in range(H):
            for x in range(W):
                want[y, x] += part[y * h // H, x * w // W] * h * w / (H * W)
    np.testing.assert_allclose(axes[3].images[0].get_array(), want, rtol=1e-5, atol=1e-9)


def test_samples_are_drawn_at_their_pixels_with_their_weights(scene, axes):
    queries = [(10, 6), (24, 6), (17, 10), (8, 16), (27, 15)]  # x, y
    drawn = [tuple(int(v[0]) for v in line.get_data()) for line in axes[0].lines]
    assert drawn == queries
    dots = [dots for dots in axes[0].collections if len(dots.get_offsets())]
    assert len(dots) == len(queries) * demo.LEVELS
    for number, dot in enumerate(dots):
        (x, y), level = queries[number // demo.LEVELS], number % demo.LEVELS
        points = scene.locations[0, y * W + x, :, level].reshape(-1, 2) * (W, H) - 0.5
        np.testing.assert_allclose(dot.get_offsets(), points, atol=1e-4)
        np.testing.assert_allclose(dot.get_sizes(), 6 + 260 * scene.weights[0, y * W + x, :, level].ravel(), rtol=1e-4)
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == [f"level {level}: {h} x {w}" for level, (h, w) in enumerate(scene.shapes)]
    assert axes[0].get_xlim() == (-0.5, W - 0.5)
    assert axes[0].get_ylim() == (H - 0.5, -0.5)


@pytest.mark.parametrize(("shape", "aspect"), [((4, 32), 1.0), ((4, 33), "auto"), ((33, 4), "auto")])
def test_a_line_of_pixels_is_stretched(shape, aspect):
    photograph = np.random.default_rng(1).uniform(0, 1, (*shape, 3))
    drawn = demo.make_scene(photograph)
    figure = picture._draw(drawn, demo.run(drawn, "cpu"))
    assert figure.axes[0].get_aspect() == aspect
    assert figure.get_size_inches()[1] <= 14


def test_errors_are_against_float64_and_times_are_medians(monkeypatch, scene, outcome):
    assert set(outcome.errors) == {"output", "grad_value", "grad_locations", "grad_weights"}
    assert all(0 < error < 5e-6 for error in outcome.errors.values())
    ticks = iter(np.cumsum([0, 5, 0, 1, 0, 9, 0, 2, 0, 3]))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(ticks)))
    calls = []
    assert demo._median_seconds(lambda: calls.append("call"), lambda: calls.append("wait")) == 3
    assert calls == ["wait", "call", "wait"] * 5
