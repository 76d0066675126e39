/* libcuda.so.1 without a GPU: what Triton asks a driver for, with a chip's limits enforced as the driver enforces them, and no
   kernel run.  stub_gpu.py builds and loads it.

   A module is its ELF image, a function a struct Function; memory is the host's.  Whatever is called and is not here is
   an undefined symbol, which the linker names. */
#include "cuda.h"
#include <stdlib.h>
#include <string.h>

enum { WITHOUT_ASKING = 48 * 1024, MOST_THREADS = 1024, RESERVED = 1024 };

static struct { int major, minor, shared; } chip = {9, 0, 232448};
static struct { char name[256]; unsigned grid[3], threads, shared; } last;
static long launches;
static unsigned fault_at;
static CUcontext current;

typedef struct { char name[256]; unsigned most_shared; } Function;
static Function functions[1 << 14];
static unsigned loaded;

void stub_chip(int major, int minor, int shared) {
    chip.major = major, chip.minor = minor, chip.shared = shared;
}
void stub_fault_at(unsigned threads) { fault_at = threads; } /* a launch of so many threads ends the process */
long stub_launches(void) { return launches; }
const char *stub_name(void) { return last.name; }
unsigned stub_last(int n) { return n < 3 ? last.grid[n] : n == 3 ? last.threads : last.shared; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument"
            : error == CUDA_ERROR_INVALID_IMAGE ? "device kernel image is invalid" : "error of the stub driver";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; } /* Triton's caches go by number */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = chip.major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = chip.minor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = chip.shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = chip.shared + RESERVED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; /* clock rates and the like */
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)&chip; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image;
    return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (loaded == sizeof functions / sizeof *functions) return CUDA_ERROR_OUT_OF_MEMORY;
    Function *mine = &functions[loaded++];
    strncpy(mine->name, name, sizeof mine->name - 1);
    mine->most_shared = WITHOUT_ASKING;
    *function = (CUfunction)mine;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0; /* no static memory, no spills */
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    if (value > chip.shared) return CUDA_ERROR_INVALID_VALUE;
    ((Function *)function)->most_shared = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 1;
    return CUDA_SUCCESS;
}

/* CUDA programming guide, technical specifications per compute capability: a grid of up to 2^31 - 1 x 65535 x 65535 */
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    const Function *mine = (const Function *)function;
    const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (!config->gridDimX || config->gridDimX > 0x7FFFFFFFu || !config->gridDimY || config->gridDimY > 65535 ||
        !config->gridDimZ || config->gridDimZ > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    if (!threads || threads > MOST_THREADS || config->sharedMemBytes > mine->most_shared) return CUDA_ERROR_INVALID_VALUE;
    if (threads == fault_at) abort();
    memcpy(last.name, mine->name, sizeof last.name);
    last.grid[0] = config->gridDimX, last.grid[1] = config->gridDimY, last.grid[2] = config->gridDimZ;
    last.threads = threads, last.shared = config->sharedMemBytes;
    launches++;
    return CUDA_SUCCESS;
}
