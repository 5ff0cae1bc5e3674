"""Any model served by this operator, by one call."""

from __future__ import annotations

from torch import nn

from .integrations import search
from .integrations.model_patch import ModelPatch


def patch(model: nn.Module | None = None) -> ModelPatch:
    """Serve every model by this operator: those that exist already and those to come.

    Functions, autograd functions and layers that are named after deformable attention, and whose parameters follow a
    documented pattern, are called with small random inputs in float64. Those whose output and gradients are the
    operator's are replaced, for the layouts in which they are. What cannot run on a CPU is compared at its first call.
    All other calls, and tensors on devices without kernels, go to the original.

    Parameters
    ----------
    model : torch.nn.Module, optional
        Its layers are searched too, for functions that they keep, and watched: a call of an attention layer that does
        not reach the operator warns.

    Returns
    -------
    ModelPatch
        A context manager. ``report()`` says what is served, in which layouts and how often it was called since, and
        what is not and why; ``undo()`` restores everything.

    Warns
    -----
    UserWarning
        At the first call of an attention layer of `model` that does not reach the operator.

    Notes
    -----
    A function is exchanged in place, so it is served wherever it is held: in its module, under another module's name,
    in a layer or in a ``functools.partial``. Modules that are imported later are served when they are imported.
    Models that ``torch.compile`` has compiled follow; what ``torch.jit`` has compiled does not.

    Examples
    --------
    >>> with cupy_msda.torch.patch(model) as patch:
    ...     train(model)
    ...     print(patch.report())
    """
    done = ModelPatch()
    try:
        if model is not None:
            done.serve(list(search.in_model(model)))
        done.serve(list(search.in_loaded_modules()))
        done.watch_imports()
        if model is not None:
            done.watch_layers(model)
    except BaseException:
        done.undo()
        raise
    return done
