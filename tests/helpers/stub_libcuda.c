/* libcuda without a GPU: a device that variables describe, memory of the host, and a launch that calls back. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int launch_callback(const unsigned *grid, unsigned threads, unsigned shared_bytes, void *stream, void **parameters);

launch_callback *stub_launch;
int stub_major = 9, stub_minor, stub_multiprocessors = 132;
int stub_attributes[16];        /* of the kernel, as they were set last */
int stub_load_status, stub_unloaded;
const void *stub_image;
static int module, function;

int cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 0) return 101;
    *value = attribute == 16 ? stub_multiprocessors : attribute == 75 ? stub_major : attribute == 76 ? stub_minor : -1;
    return *value < 0;
}

int cuModuleLoadData(void **loaded, const void *image) {
    *loaded = &module;
    stub_image = image;
    return stub_load_status;
}

int cuModuleGetFunction(void **found, void *of, const char *name) {
    *found = &function;
    return of == &module && strcmp(name, "msda_forward") == 0 ? 0 : 500;
}

int cuModuleUnload(void *unloaded) {
    ++stub_unloaded;
    return unloaded == &module ? 0 : 400;
}

int cuFuncSetAttribute(void *of, int attribute, int value) {
    if (of != &function) return 400;
    stub_attributes[attribute] = value;
    return 0;
}

int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t count, void *stream) {
    (void)stream;
    memset((void *)(size_t)address, value, count);
    return 0;
}

int cuLaunchKernel(void *launched, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z,
                   unsigned shared_bytes, void *stream, void **parameters, void **extra) {
    const unsigned grid[3] = {x, y, z};
    if (launched != &function || block_y != 1 || block_z != 1 || extra) return 400;
    return stub_launch ? stub_launch(grid, block_x, shared_bytes, stream, parameters) : 0;
}

/* ---- what a whole program calls ----------------------------------------------------------------------------- */

int cuInit(unsigned flags) { return flags != 0; }

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal != 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &module;
    return device != 0;
}

int cuCtxSetCurrent(void *context) { return context != &module; }

int cuMemAlloc_v2(unsigned long long *memory, size_t bytes) {
    *memory = (unsigned long long)(size_t)calloc(bytes, 1);     /* at a multiple of 16 bytes */
    return *memory == 0;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes) {
    memcpy((void *)(size_t)to, from, bytes);
    return 0;
}

int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
    memcpy(to, (const void *)(size_t)from, bytes);
    return 0;
}

int cuStreamSynchronize(void *stream) { return stream != NULL; }
