/* The functions of libcuda that the exported launcher calls: a device described by variables, and a launch that calls back. */
#include <stddef.h>
#include <string.h>

typedef int launch_callback(const unsigned *grid, unsigned threads, unsigned shared_bytes, void *stream, void **parameters);

launch_callback *stub_launch;
int stub_major, stub_minor, stub_multiprocessors;
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
    return stub_launch(grid, block_x, shared_bytes, stream, parameters);
}
