"""How far a served model is from itself, in float64: outputs, and the gradients of all parameters."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """The largest relative difference of outputs and of gradients, and the calls served."""

    outputs: float
    gradients: float
    calls: int
    conventions: tuple[str, ...]


def tensors_in(found):
    """Tensors of any nesting of outputs that depend on parameters."""
    if torch.is_tensor(found):
        return [found] if found.requires_grad and found.numel() else []
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def run(model, call):
    """Outputs, and every parameter's gradient of one number made of all of them."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = tensors_in(call(model))
    weights = [torch.linspace(0.5, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in outputs]
    sum((t * w).masked_fill(~t.isfinite(), 0).sum() for t, w in zip(outputs, weights, strict=True)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach().masked_fill(~t.isfinite(), 0) for t in outputs], gradients


def prepared(model):
    """In float64, without dropout, and with other numbers where parameters start at zero, which hides differences."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def compare(model, call, patch):
    """Run a model as it is and inside ``patch(model)``."""
    want_outputs, want = run(model, call)
    with patch(model) as patched:
        outputs, gradients = run(model, call)
        lines = [line for line in patched.report() if line.calls]
    assert gradients.keys() == want.keys()
    return Agreement(
        _difference(outputs, want_outputs),
        _difference(list(gradients.values()), [want[name] for name in gradients]),
        sum(line.calls for line in lines),
        tuple(sorted({line.convention.partition(" or ")[0] for line in lines})),
    )


def _difference(have, want):
    """Relative to the norm of each tensor; sums that cancel, to less than 1e-4 of the largest, are noise."""
    largest = max(tensor.norm() for tensor in want)
    assert largest > 0
    return float(max((a - b).norm() / max(b.norm(), 1e-4 * largest) for a, b in zip(have, want, strict=True)))
