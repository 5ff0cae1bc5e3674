/* See cupy_msda_launch.h. The grid is that of cupy_msda/cuda/plan.py. */
#include "cupy_msda_launch.h"

#include <stddef.h>

/* The driver's functions, as cuda.h declares them: CUresult is an int, handles are pointers, CUdeviceptr has 64 bits. */
int cuCtxGetDevice(int *device);
int cuDeviceGetAttribute(int *value, int attribute, int device);
int cuModuleLoadData(void **module, const void *image);
int cuModuleGetFunction(void **function, void *module, const char *name);
int cuModuleUnload(void *module);
int cuFuncSetAttribute(void *function, int attribute, int value);
int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t count, void *stream);
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void *stream, void **parameters, void **extra);

enum {
    MULTIPROCESSOR_COUNT = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76,    /* of CUdevice_attribute */
    MAX_SHARED_BYTES = 8, SHARED_CARVEOUT = 9,                                  /* of CUfunction_attribute */
    SHARED_WITHOUT_OPT_IN = 48 * 1024, MAX_GRID_Y = 65535, MAX_GRID_Z = 65535
};

/* The kernel's parameter `metadata`. */
typedef struct level_metadata {
    const int64_t *shapes, *starts;
} level_metadata;

typedef struct grid {
    int64_t x, y, z;
} grid;

/* ---- loading ------------------------------------------------------------------------------------------------ */

/* Compute capabilities of Tegra, such as Jetson Orin's 8.7. */
static int is_tegra(int major, int minor) {
    int capability = 10 * major + minor;
    return capability == 72 || capability == 87 || capability == 101 || capability == 110;
}

/* A cubin runs on its compute capability and on later minor ones. NVIDIA promises this without Tegra alone: a cubin
   for Tegra runs nowhere else, and Tegra runs no other (CUDA C++ Programming Guide, "Binary Compatibility"). */
static int runs_on(const cupy_msda_cubin *cubin, int major, int minor) {
    if (cubin->major != major) return 0;
    if (is_tegra(major, cubin->minor) || is_tegra(major, minor)) return cubin->minor == minor;
    return cubin->minor <= minor;
}

/* The newest one that runs, or NULL. */
static const cupy_msda_cubin *cubin_for(const cupy_msda_configuration *configuration, int major, int minor) {
    const cupy_msda_cubin *found = NULL;
    int i;
    for (i = 0; i < configuration->cubin_count; ++i) {
        const cupy_msda_cubin *cubin = &configuration->cubins[i];
        if (runs_on(cubin, major, minor) && (!found || cubin->minor > found->minor)) found = cubin;
    }
    return found;
}

static int set_attributes(const cupy_msda_kernel *kernel) {
    int status = CUPY_MSDA_OK;
    if (kernel->cubin->shared_bytes > SHARED_WITHOUT_OPT_IN)
        status = cuFuncSetAttribute(kernel->function, MAX_SHARED_BYTES, (int)kernel->cubin->shared_bytes);
    if (status == CUPY_MSDA_OK) status = cuFuncSetAttribute(kernel->function, SHARED_CARVEOUT, kernel->cubin->carveout);
    return status;
}

int cupy_msda_load(cupy_msda_kernel *kernel, const cupy_msda_configuration *configuration) {
    int status, device, major, minor, multiprocessors;
    if (!kernel || !configuration) return CUPY_MSDA_NULL_POINTER;
    if ((status = cuCtxGetDevice(&device)) != 0) return status;
    if ((status = cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device)) != 0) return status;
    if ((status = cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device)) != 0) return status;
    if ((status = cuDeviceGetAttribute(&multiprocessors, MULTIPROCESSOR_COUNT, device)) != 0) return status;
    kernel->configuration = configuration;
    kernel->cubin = cubin_for(configuration, major, minor);
    if (!kernel->cubin) return CUPY_MSDA_NO_CUBIN;
    kernel->wave = kernel->cubin->resident_blocks * multiprocessors;
    if ((status = cuModuleLoadData(&kernel->module, kernel->cubin->image)) != 0) return status;
    status = cuModuleGetFunction(&kernel->function, kernel->module, "msda_forward");
    if (status == CUPY_MSDA_OK) status = set_attributes(kernel);
    if (status != CUPY_MSDA_OK) cupy_msda_unload(kernel);
    return status;
}

int cupy_msda_unload(cupy_msda_kernel *kernel) {
    void *module;
    if (!kernel) return CUPY_MSDA_NULL_POINTER;
    module = kernel->module;
    kernel->module = 0;
    return module ? cuModuleUnload(module) : CUPY_MSDA_OK;
}

/* ---- checks ------------------------------------------------------------------------------------------------- */

static int check_sizes(const cupy_msda_kernel *kernel, const cupy_msda_arguments *arguments) {
    const cupy_msda_cubin *cubin = kernel->cubin;
    if (arguments->N < 0 || arguments->S < 0 || arguments->Q < 0) return CUPY_MSDA_NEGATIVE_SIZE;
    if (kernel->configuration->pixel_queries && arguments->Q != arguments->S) return CUPY_MSDA_NOT_PIXELS;
    if (arguments->S > cubin->max_S || arguments->Q > cubin->max_Q) return CUPY_MSDA_TOO_LARGE;
    if (arguments->N > cubin->max_heads / kernel->configuration->M) return CUPY_MSDA_TOO_LARGE;
    return CUPY_MSDA_OK;
}

/* Of an array that the kernel reads or writes (`used`) or does not know. */
static int check_pointer(const void *pointer, int used, uintptr_t alignment) {
    if (used && !pointer) return CUPY_MSDA_NULL_POINTER;
    if (!used && pointer) return CUPY_MSDA_UNUSED_POINTER;
    return (uintptr_t)pointer % alignment ? CUPY_MSDA_MISALIGNED_POINTER : CUPY_MSDA_OK;
}

static int check_pointers(const cupy_msda_configuration *configuration, const cupy_msda_arguments *arguments) {
    int status;
    if ((status = check_pointer(arguments->value, 1, 16)) != 0) return status;
    if ((status = check_pointer(arguments->spatial_shapes, 1, 8)) != 0) return status;
    if ((status = check_pointer(arguments->level_start_index, arguments->level_start_index != NULL, 8)) != 0) return status;
    if ((status = check_pointer(arguments->locations, 1, 16)) != 0) return status;
    if ((status = check_pointer(arguments->weights, !configuration->packed_weights, 16)) != 0) return status;
    if ((status = check_pointer(arguments->references, configuration->fused, 16)) != 0) return status;
    if ((status = check_pointer(arguments->query_lengths, configuration->ragged, 8)) != 0) return status;
    return check_pointer(arguments->output, 1, 16);
}

/* ---- launch ------------------------------------------------------------------------------------------------- */

/* `a / b` of positive numbers, rounded to the nearest integer, and to the even one of two. */
static int64_t rounded_quotient(int64_t a, int64_t b) {
    const int64_t quotient = a / b, twice = 2 * (a % b);
    return quotient + (twice > b || (twice == b && quotient % 2));
}

/* Rows of the grid: one per heads_per_warp heads. With several query tiles the last heads have one per tile, about a wave. */
static int64_t grid_rows(const cupy_msda_kernel *kernel, int64_t heads, int64_t blocks) {
    const int64_t rows = heads / kernel->cubin->heads_per_warp, tiles = kernel->cubin->query_tiles;
    int64_t divided;
    if (tiles == 1) return rows;
    divided = rounded_quotient(kernel->wave, blocks);
    if (divided < 1) divided = 1;
    if (divided > rows) divided = rows;
    return rows + divided * (tiles - 1);
}

static int plan_grid(const cupy_msda_kernel *kernel, const cupy_msda_arguments *arguments, grid *planned) {
    const int64_t per_block = kernel->cubin->queries_per_block;
    const int64_t blocks = (arguments->Q + per_block - 1) / per_block;
    const int64_t rows = grid_rows(kernel, arguments->N * kernel->configuration->M, blocks);
    planned->x = blocks;
    planned->y = rows < MAX_GRID_Y ? rows : MAX_GRID_Y;
    planned->z = (rows + planned->y - 1) / planned->y;
    if (planned->x > INT32_MAX || planned->z > MAX_GRID_Z) return CUPY_MSDA_TOO_LARGE;
    return planned->z > 1 && kernel->cubin->query_tiles > 1 ? CUPY_MSDA_TOO_LARGE : CUPY_MSDA_OK;
}

static int launch(const cupy_msda_kernel *kernel, const cupy_msda_arguments *arguments, const grid *planned, void *stream) {
    const cupy_msda_configuration *configuration = kernel->configuration;
    const char *weights = (const char *)arguments->weights;
    level_metadata metadata;
    int64_t image_stride = arguments->S * configuration->M * configuration->D, head_stride = configuration->D;
    int64_t heads = arguments->N * configuration->M, S = arguments->S, Q = arguments->Q;
    const void *value = arguments->value, *locations = arguments->locations, *references = arguments->references;
    const int64_t *lengths = arguments->query_lengths;
    void *output = arguments->output, *parameters[12];
    metadata.shapes = arguments->spatial_shapes;
    metadata.starts = arguments->level_start_index;
    if (configuration->packed_weights)
        weights = (const char *)locations + configuration->packed_weights * configuration->location_bytes;
    parameters[0] = (void *)&value;
    parameters[1] = &metadata;
    parameters[2] = (void *)&locations;
    parameters[3] = (void *)&weights;
    parameters[4] = (void *)&references;
    parameters[5] = (void *)&lengths;
    parameters[6] = &output;
    parameters[7] = &S;
    parameters[8] = &Q;
    parameters[9] = &image_stride;
    parameters[10] = &head_stride;
    parameters[11] = &heads;
    return cuLaunchKernel(kernel->function, (unsigned)planned->x, (unsigned)planned->y, (unsigned)planned->z,
                          kernel->cubin->threads, 1, 1, kernel->cubin->shared_bytes, stream, parameters, NULL);
}

int cupy_msda_forward(const cupy_msda_kernel *kernel, const cupy_msda_arguments *arguments, void *stream) {
    grid planned;
    int status;
    if (!kernel || !arguments) return CUPY_MSDA_NULL_POINTER;
    if ((status = check_sizes(kernel, arguments)) != 0) return status;
    if (arguments->N == 0 || arguments->Q == 0) return CUPY_MSDA_OK;
    if (arguments->S == 0) {    /* no pixels: zeros */
        const cupy_msda_configuration *of = kernel->configuration;
        const size_t bytes = (size_t)(arguments->N * arguments->Q * of->M * of->D * of->value_bytes);
        if ((status = check_pointer(arguments->output, 1, 16)) != 0) return status;
        return cuMemsetD8Async((unsigned long long)(uintptr_t)arguments->output, 0, bytes, stream);
    }
    if ((status = check_pointers(kernel->configuration, arguments)) != 0) return status;
    if ((status = plan_grid(kernel, arguments, &planned)) != 0) return status;
    return launch(kernel, arguments, &planned, stream);
}
