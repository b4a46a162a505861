/* The CUDA runtime without a GPU, as nvcc's objects call it: every kernel is known, and a launch starts nothing. */
#include <stddef.h>
typedef struct { unsigned x, y, z; } dim3;
unsigned long launches = 0;
static void *handle;
void **__cudaRegisterFatBinary(void *binary) { return &handle; }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *warp) {}
void __cudaRegisterVar(void **binary, char *host, char *device, const char *name, int ext, size_t size, int c, int g) {}
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
int __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **args, size_t shared, void *stream) { ++launches; return 0; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) { return 0; }
int cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, void *stream) { ++launches; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaFuncSetAttribute(const void *kernel, int attribute, int value) { return 0; }
int cudaGetLastError(void) { return 0; }
const char *cudaGetErrorString(int error) { return "stub"; }
