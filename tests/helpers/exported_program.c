/* program FOLDER N S Q BYTES: one forward of the configuration that CONFIGURATION names, without Python.
 *
 * Reads FOLDER/<argument>.bin for each argument that is there, and writes BYTES of output into FOLDER/output.bin.
 */
#include <stdio.h>
#include <stdlib.h>

#include "cupy_msda_kernels.h"

typedef unsigned long long address;

int cuInit(unsigned flags);
int cuDeviceGet(int *device, int ordinal);
int cuDevicePrimaryCtxRetain(void **context, int device);
int cuCtxSetCurrent(void *context);
int cuMemAlloc_v2(address *memory, size_t bytes);
int cuMemcpyHtoD_v2(address to, const void *from, size_t bytes);
int cuMemcpyDtoH_v2(void *to, address from, size_t bytes);
int cuStreamSynchronize(void *stream);

static void check(int status, const char *what) {
    if (status == 0) return;
    fprintf(stderr, "%s: status %d\n", what, status);
    exit(1);
}

static FILE *open_file(const char *folder, const char *name, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.bin", folder, name);
    return fopen(path, mode);
}

/* The file of an argument in the memory of the device; null where there is none. */
static const void *argument(const char *folder, const char *name) {
    FILE *file = open_file(folder, name, "rb");
    address memory;
    char *content;
    long bytes;
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    bytes = ftell(file);
    rewind(file);
    content = malloc((size_t)bytes);
    if (!content || fread(content, 1, (size_t)bytes, file) != (size_t)bytes) exit(2);
    fclose(file);
    check(cuMemAlloc_v2(&memory, (size_t)bytes), name);
    check(cuMemcpyHtoD_v2(memory, content, (size_t)bytes), name);
    free(content);
    return (const void *)(uintptr_t)memory;
}

static void write_output(const char *folder, const void *output, size_t bytes) {
    FILE *file = open_file(folder, "output", "wb");
    char *content = malloc(bytes);
    if (!file || !content) exit(2);
    check(cuMemcpyDtoH_v2(content, (address)(uintptr_t)output, bytes), "output");
    if (fwrite(content, 1, bytes, file) != bytes || fclose(file)) exit(2);
    free(content);
}

int main(int count, char **words) {
    cupy_msda_arguments arguments = {0};
    cupy_msda_kernel kernel;
    const char *folder;
    address output;
    size_t bytes;
    void *context;
    int device;
    if (count != 6) return 2;
    folder = words[1];
    check(cuInit(0), "cuInit");
    check(cuDeviceGet(&device, 0), "cuDeviceGet");
    check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");

    arguments.N = atoll(words[2]);
    arguments.S = atoll(words[3]);
    arguments.Q = atoll(words[4]);
    bytes = (size_t)atoll(words[5]);
    arguments.value = argument(folder, "value");
    arguments.spatial_shapes = argument(folder, "spatial_shapes");
    arguments.level_start_index = argument(folder, "level_start_index");
    arguments.locations = argument(folder, "locations");
    arguments.weights = argument(folder, "weights");
    arguments.references = argument(folder, "references");
    arguments.query_lengths = argument(folder, "query_lengths");
    check(cuMemAlloc_v2(&output, bytes), "cuMemAlloc");
    arguments.output = (void *)(uintptr_t)output;

    check(cupy_msda_load(&kernel, &CONFIGURATION), "cupy_msda_load");
    check(cupy_msda_forward(&kernel, &arguments, NULL), "cupy_msda_forward");
    check(cuStreamSynchronize(NULL), "cuStreamSynchronize");
    write_output(folder, arguments.output, bytes);
    check(cupy_msda_unload(&kernel), "cupy_msda_unload");
    return 0;
}
