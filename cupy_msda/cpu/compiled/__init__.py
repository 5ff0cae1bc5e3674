"""The compiled tier of the CPU path: loops over samples that numba compiles on first use and caches on disk.

`run` divides a call into blocks for the threads; `kernels` has the operator, `front_end` the locations and weights of a
fused call, and `build` compiles them. Only this room imports numba.
"""
