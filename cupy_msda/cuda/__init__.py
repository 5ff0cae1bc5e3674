"""The CUDA path: which kernels a call runs, their compilation, and their launches."""
