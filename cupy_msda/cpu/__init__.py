"""The NumPy path: the operator on the CPU, without a compiler."""
