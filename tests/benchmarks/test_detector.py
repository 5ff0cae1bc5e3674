"""A small detector learns the same with this operator and with the grid_sample composition."""

import pytest
import torch

from benchmarks import detector


def losses_of_both(steps):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return [detector.train(name, steps=steps, device="cpu", N=4)["losses"] for name in detector.CURVES]
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_first_steps_agree():
    losses, expected = losses_of_both(steps=10)
    assert losses[:6] == pytest.approx(expected[:6], rel=1e-3)


@pytest.mark.long
def test_loss_curves_agree():
    losses, expected = losses_of_both(steps=200)
    # Rounding errors grow from step to step. Equal first steps show equal gradients.
    assert losses[:6] == pytest.approx(expected[:6], rel=1e-3)
    means = [detector.smoothed(curve) for curve in (losses, expected)]
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert means[0][-1] < 0.6 * means[0][0]
