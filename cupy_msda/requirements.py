"""What the extras install, for messages that say how to install a missing package."""

from __future__ import annotations

#: By the name of the distribution: the requirement that ``setup.cfg`` has in an extra. A test compares them.
REQUIREMENTS = {
    "cupy-cuda12x": "cupy-cuda12x>=13.4",
    "cupy-cuda13x": "cupy-cuda13x>=14.0",
    "jax": "jax>=0.6,<0.12",
    "matplotlib": "matplotlib>=3.8",
    "ml_dtypes": "ml_dtypes>=0.5",
    "numba": "numba>=0.61",
    "nvidia-cuda-nvrtc": "nvidia-cuda-nvrtc>=13",
    "nvidia-cuda-nvrtc-cu12": "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime": "nvidia-cuda-runtime>=13",
    "nvidia-cuda-runtime-cu12": "nvidia-cuda-runtime-cu12",
    "pillow": "pillow>=10",
    "torch": "torch>=2.4",
}


def quoted(*distributions: str) -> str:
    """The requirements of these distributions as a shell takes them."""
    return " ".join(f"'{REQUIREMENTS[name]}'" if REQUIREMENTS[name] != name else name for name in distributions)


def install(*distributions: str) -> str:
    """The command that installs these distributions, in the versions that this package supports."""
    return f"pip install {quoted(*distributions)}"
