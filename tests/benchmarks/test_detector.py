"""A detector learns the same with our operator as with the composition."""

import pytest
import torch

from benchmarks import detector


def test_loss_curves_agree():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ours, theirs = (detector.train(name, steps=200, device="cpu", N=4)["losses"] for name in detector.CURVES)
    finally:
        torch.use_deterministic_algorithms(False)
    # Rounding errors grow from step to step; the first steps show that the gradients are the same.
    assert ours[:6] == pytest.approx(theirs[:6], rel=1e-3)
    means = [detector.smoothed(losses) for losses in (ours, theirs)]
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert means[0][-1] < 0.6 * means[0][0]
