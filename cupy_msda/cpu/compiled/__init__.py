"""The compiled tier of the CPU path: loops over samples that numba compiles on first use and caches on disk.

`run` divides a call into blocks for the threads; `kernels` has the operator, `front_end` the locations and weights of a
fused call, `casts` the casts from and to 16 bits; `build` compiles them. Only this folder imports
numba.
"""
