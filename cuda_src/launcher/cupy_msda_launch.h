/* Launches exported kernels of multi-scale deformable attention through the CUDA driver, without Python.
 *
 * C99. Needs no header of CUDA: link libcuda and nothing else. No function allocates memory or waits for the GPU.
 *
 * N images, S pixels of all levels, M heads, D channels per head, L levels, P points per level, Q queries. Every pointer of
 * cupy_msda_arguments is an address in the memory of the current device, whose arrays are contiguous in the order shown.
 * Floating-point arrays start at a multiple of 16 bytes, as what cuMemAlloc and cudaMalloc return does.
 */
#ifndef CUPY_MSDA_LAUNCH_H
#define CUPY_MSDA_LAUNCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns: 0, one of these, or the number of an error of the CUDA driver, which is positive. */
enum {
    CUPY_MSDA_OK = 0,
    CUPY_MSDA_NULL_POINTER = -1,        /* an argument that the kernel reads is null */
    CUPY_MSDA_UNUSED_POINTER = -2,      /* an argument that the kernel does not read is given */
    CUPY_MSDA_MISALIGNED_POINTER = -3,  /* an array starts at no multiple of 16 bytes, or of 8 where it holds integers */
    CUPY_MSDA_NEGATIVE_SIZE = -4,       /* N, S or Q is negative */
    CUPY_MSDA_NOT_PIXELS = -5,          /* the kernel is for queries that are pixels, and Q differs from S */
    CUPY_MSDA_TOO_LARGE = -6,           /* N, S or Q is larger than the kernel can count */
    CUPY_MSDA_NO_CUBIN = -7             /* no cubin for the architecture of the current device */
};

/* A kernel for one architecture. */
typedef struct cupy_msda_cubin {
    int major, minor;                   /* compute capability that it is compiled for */
    const uint64_t *image;              /* the cubin */
    uint32_t threads, shared_bytes;     /* of a block */
    int carveout;                       /* percentage of the multiprocessor's memory that is shared memory */
    int64_t queries_per_block, query_tiles, heads_per_warp, resident_blocks;
    int64_t max_S, max_Q, max_heads;    /* that its indices count; max_heads limits N * M */
} cupy_msda_cubin;

/* What cupy_msda_kernels.h declares: an exported configuration. */
typedef struct cupy_msda_configuration {
    int64_t M, D;
    int64_t value_bytes, location_bytes; /* of a number of value and of locations */
    int64_t packed_weights;             /* numbers before the first logit where locations hold the logits too, otherwise 0 */
    int fused, ragged, pixel_queries;   /* whether it reads references, reads query_lengths, needs Q = S */
    const cupy_msda_cubin *cubins;
    int cubin_count;
} cupy_msda_configuration;

/* A configuration that is loaded into the CUDA context that was current. Threads may launch it at the same time. */
typedef struct cupy_msda_kernel {
    const cupy_msda_configuration *configuration;
    const cupy_msda_cubin *cubin;
    void *module, *function;
    int64_t wave;                       /* blocks that the whole GPU holds at a time */
} cupy_msda_kernel;

typedef struct cupy_msda_arguments {
    const void *value;                  /* [N, S, M, D] */
    const int64_t *spatial_shapes;      /* [L, 2]: (H, W) of each level */
    const int64_t *level_start_index;   /* [L]: first pixel of each level in S; null: levels follow each other */
    const void *locations;              /* [N, Q, M, K, 2] for the K points of all levels; fused: the offsets, packed: also the logits */
    const void *weights;                /* [N, Q, M, K]; fused: the logits; packed: null */
    const void *references;             /* fused: [N, Q, L or 1, 2 or 4]; otherwise null */
    const int64_t *query_lengths;       /* ragged: [N]; otherwise null */
    void *output;                       /* [N, Q, M * D], which the call writes */
    int64_t N, S, Q;
} cupy_msda_arguments;

/* Loads a configuration into the current context. The driver may allocate memory for the code. */
int cupy_msda_load(cupy_msda_kernel *kernel, const cupy_msda_configuration *configuration);

/* Queues the forward on `stream`, a CUstream or cudaStream_t. Null is the default stream. A level that does not fit into S
 * gives NaN. The arguments are read before it returns, the arrays when the stream gets there. */
int cupy_msda_forward(const cupy_msda_kernel *kernel, const cupy_msda_arguments *arguments, void *stream);

/* Unloads it. No launch of it may be pending. */
int cupy_msda_unload(cupy_msda_kernel *kernel);

#ifdef __cplusplus
}
#endif

#endif
