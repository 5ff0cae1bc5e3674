"""What a command says where a package or a GPU is missing: one sentence instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType

# Parts of torch's messages for a build without CUDA, a machine without a driver, and one without a device.
_WITHOUT_CUDA = ("not compiled with CUDA", "Found no NVIDIA driver", "No CUDA GPUs are available")


def install() -> None:
    """Take over what the interpreter prints of an exception that nobody catches."""
    sys.excepthook = _report


def sentence_of(error: BaseException) -> str | None:
    """What is missing and the remedy, or None for another error."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'needs {error.name}, which is not installed: pip install -e ".[test]" in the checkout'
    if any(words in str(error) for words in _WITHOUT_CUDA):
        return f"needs an NVIDIA GPU and a torch that is built for CUDA: {' '.join(str(error).split())}"
    return None


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sentence = sentence_of(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"{sys.argv[0]}: {sentence}", file=sys.stderr)
