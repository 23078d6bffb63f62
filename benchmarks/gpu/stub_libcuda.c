// A libcuda.so.1 that runs nothing and keeps the rules.
//
// It has what Triton's driver and its launchers call, with the limits of an H200.  Binaries are read far
// enough to know the registers and the static shared memory of a kernel; tensor maps and launches are held to
// the rules that the CUDA driver's documentation gives for cuTensorMapEncodeTiled and cuLaunchKernelEx.
// cuGetErrorString tells which rule the last failed call broke.  The stub_* functions are its own: what has
// been done so far.

#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#undef cuDevicePrimaryCtxRetain
#undef cuLaunchKernelEx
#undef cuPointerGetAttribute

enum {
  MULTIPROCESSORS = 132,
  SHARED_BY_DEFAULT = 48 * 1024,
  SHARED_RESERVED = 1024,  // of each block by the system, in the binary but in none of the limits
  SHARED_OPT_IN = 227 * 1024,
  SHARED_OF_MULTIPROCESSOR = 228 * 1024,
  REGISTERS = 65536,
  REGISTER_STEP = 8,  // registers of a thread are handed out in such steps
  THREADS = 1024,
  WARP = 32,
  BOX_LIMIT = 256,
  ELEMENT_STRIDE_LIMIT = 8,
  TENSOR_MAP_RANKS = 5,
  ADDRESS_ALIGNMENT = 16,
  TENSOR_MAP_ALIGNMENT = 64,
  CLUSTER_LIMIT = 8,
};

typedef struct {
  char* name;
  unsigned registers;
  unsigned static_shared;
  unsigned dynamic_shared_limit;
} Kernel;

static __thread char broken_rule[768] = "no rule was broken";
static unsigned long launches, tensor_maps;

unsigned long stub_launches(void) { return launches; }
unsigned long stub_tensor_maps(void) { return tensor_maps; }

__attribute__((format(printf, 2, 3))) static CUresult refuse(CUresult code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(broken_rule, sizeof broken_rule, format, values);
  va_end(values);
  return code;
}

#define RULE(holds, ...) \
  if (!(holds)) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__)

CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = code == CUDA_SUCCESS ? "no error" : broken_rule;
  return CUDA_SUCCESS;
}

// Contexts and devices.

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  RULE(ordinal == 0, "there is one device, not a number %d", ordinal);
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = SHARED_OPT_IN;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = SHARED_OF_MULTIPROCESSOR;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = REGISTERS;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = MULTIPROCESSORS;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = WARP;
      break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      *value = 1980000;
      break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      *value = 3201000;
      break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 6144;
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, "the stub knows no device attribute %d", (int)attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  RULE(attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER, "the stub knows no pointer attribute %d",
       (int)attribute);
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}

// Modules: a module is its ELF image.

static const Elf64_Shdr* section(const unsigned char* image, const char* prefix, const char* name) {
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + head->e_shoff);
  const char* names = (const char*)image + sections[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++) {
    const char* found = names + sections[i].sh_name;
    size_t length = strlen(prefix);
    if (!strncmp(found, prefix, length) && !strcmp(found + length, name)) return &sections[i];
  }
  return NULL;
}

// The register count that section .nv.info notes of a kernel, in records of a format, an attribute, 16 bits
// of payload or its length, and the payload.
static unsigned registers_of(const unsigned char* image, const char* name) {
  enum { BY_LENGTH = 4, REGISTER_COUNT = 0x2f };
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + ((const Elf64_Ehdr*)image)->e_shoff);
  const Elf64_Shdr* notes = section(image, ".nv.info", "");
  if (!notes) return 0;
  const Elf64_Shdr* table = &sections[notes->sh_link];
  const Elf64_Sym* symbols = (const Elf64_Sym*)(image + table->sh_offset);
  const char* names = (const char*)image + sections[table->sh_link].sh_offset;
  const unsigned char* end = image + notes->sh_offset + notes->sh_size;
  for (const unsigned char* at = image + notes->sh_offset; at + 4 <= end;) {
    uint16_t length;
    memcpy(&length, at + 2, sizeof length);
    uint32_t value[2];  // a symbol and its count
    if (at[0] == BY_LENGTH && at[1] == REGISTER_COUNT && length == sizeof value) {
      memcpy(value, at + 4, sizeof value);
      if (!strcmp(names + symbols[value[0]].st_name, name)) return value[1];
    }
    at += at[0] == BY_LENGTH ? 4 + length : 4;
  }
  return 0;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "the binary is no ELF file");
  *module = (CUmodule)(uintptr_t)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const unsigned char* image = (const unsigned char*)module;
  const Elf64_Shdr* text = section(image, ".text.", name);
  if (!text) return refuse(CUDA_ERROR_NOT_FOUND, "the binary has no kernel %s", name);
  const Elf64_Shdr* shared = section(image, ".nv.shared.", name);
  Kernel* kernel = malloc(sizeof *kernel);
  kernel->registers = registers_of(image, name);
  if (!kernel->registers)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "the binary notes no registers of %s", name);
  kernel->name = strdup(name);
  kernel->static_shared = shared && shared->sh_size > SHARED_RESERVED ? shared->sh_size - SHARED_RESERVED : 0;
  kernel->dynamic_shared_limit = SHARED_BY_DEFAULT - kernel->static_shared;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel* kernel = (const Kernel*)function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = kernel->registers;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = kernel->static_shared;
      break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = 0;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = THREADS;
      break;
    default:
      return refuse(CUDA_ERROR_INVALID_VALUE, "the stub knows no function attribute %d", (int)attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel* kernel = (Kernel*)function;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  RULE(value >= 0 && value + kernel->static_shared <= SHARED_OPT_IN,
       "%s: %d bytes of dynamic and %u of static shared memory are more than a block's %d", kernel->name,
       value, kernel->static_shared, SHARED_OPT_IN);
  kernel->dynamic_shared_limit = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// Launches.

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  const Kernel* kernel = (const Kernel*)function;
  RULE(kernel, "no kernel is given");
  const char* name = kernel->name;
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  RULE(config->gridDimX && config->gridDimY && config->gridDimZ, "%s: the grid %u x %u x %u is empty", name,
       config->gridDimX, config->gridDimY, config->gridDimZ);
  RULE(config->gridDimX <= INT32_MAX && config->gridDimY <= UINT16_MAX && config->gridDimZ <= UINT16_MAX,
       "%s: the grid %u x %u x %u is larger than 2147483647 x 65535 x 65535", name, config->gridDimX,
       config->gridDimY, config->gridDimZ);
  RULE(threads && threads <= THREADS, "%s: a block has 1 to %d threads, not %llu", name, THREADS,
       (unsigned long long)threads);
  RULE(config->sharedMemBytes <= kernel->dynamic_shared_limit,
       "%s: %u bytes of dynamic shared memory are more than the %u that were allowed", name,
       config->sharedMemBytes, kernel->dynamic_shared_limit);
  unsigned registers = (kernel->registers + REGISTER_STEP - 1) / REGISTER_STEP * REGISTER_STEP;
  unsigned long long warps = (threads + WARP - 1) / WARP;
  if (warps * WARP * registers > REGISTERS)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
                  "%s: %llu warps with %u registers a thread need more than %d", name, warps,
                  kernel->registers, REGISTERS);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    unsigned x = config->attrs[i].value.clusterDim.x, y = config->attrs[i].value.clusterDim.y,
             z = config->attrs[i].value.clusterDim.z;
    RULE(x && y && z && x * y * z <= CLUSTER_LIMIT, "%s: a cluster has 1 to %d blocks, not %u x %u x %u",
         name, CLUSTER_LIMIT, x, y, z);
    RULE(config->gridDimX % x == 0 && config->gridDimY % y == 0 && config->gridDimZ % z == 0,
         "%s: the grid is no multiple of its clusters of %u x %u x %u", name, x, y, z);
  }
  __atomic_fetch_add(&launches, 1, __ATOMIC_RELAXED);
  return CUDA_SUCCESS;
}

// Tensor maps.

static unsigned element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

static int is_float(CUtensorMapDataType type) {
  return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ;
}

// Bytes that the inner side of a box may have.
static unsigned swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return UINT32_MAX;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  unsigned bytes = element_bytes(type);
  RULE((uintptr_t)map % TENSOR_MAP_ALIGNMENT == 0, "the tensor map lies at %p, not at a multiple of %d bytes",
       (void*)map, TENSOR_MAP_ALIGNMENT);
  RULE(bytes, "the stub knows no tensor map of data type %d", (int)type);
  RULE(rank >= 1 && rank <= TENSOR_MAP_RANKS, "a tensor map has rank 1 to %d, not %u", TENSOR_MAP_RANKS,
       rank);
  RULE(address && (uintptr_t)address % ADDRESS_ALIGNMENT == 0, "the address %p is no multiple of %d bytes",
       address, ADDRESS_ALIGNMENT);
  RULE(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "the stub knows no interleaved tensor map (%d)",
       (int)interleave);
  RULE(swizzle_span(swizzle), "the stub knows no swizzle %d", (int)swizzle);
  RULE(promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "there is no L2 promotion %d", (int)promotion);
  RULE(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || is_float(type),
       "only floats are filled with NaN, not type %d", (int)type);
  for (unsigned i = 0; i < rank; i++) {
    RULE(sizes[i] >= 1 && sizes[i] <= (cuuint64_t)1 << 32, "size %u is 1 to 2^32, not %llu", i,
         (unsigned long long)sizes[i]);
    RULE(box[i] >= 1 && box[i] <= BOX_LIMIT, "side %u of the box is 1 to %d, not %u", i, BOX_LIMIT, box[i]);
    RULE(element_strides[i] >= 1 && element_strides[i] <= ELEMENT_STRIDE_LIMIT,
         "element stride %u is 1 to %d, not %u", i, ELEMENT_STRIDE_LIMIT, element_strides[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    unsigned long long stride = strides[i];
    RULE(stride, "stride %u is zero", i + 1);
    RULE(stride % ADDRESS_ALIGNMENT == 0, "stride %u is %llu bytes, no multiple of %d", i + 1, stride,
         ADDRESS_ALIGNMENT);
    RULE(stride < (unsigned long long)1 << 40, "stride %u is %llu bytes, not below 2^40", i + 1, stride);
  }
  unsigned inner = box[0] * bytes;
  RULE(inner % ADDRESS_ALIGNMENT == 0, "the inner side of the box has %u bytes, no multiple of %d", inner,
       ADDRESS_ALIGNMENT);
  RULE(inner <= swizzle_span(swizzle), "the inner side of the box has %u bytes, more than the swizzle's %u",
       inner, swizzle_span(swizzle));
  memset(map, 0, sizeof *map);
  __atomic_fetch_add(&tensor_maps, 1, __ATOMIC_RELAXED);
  return CUDA_SUCCESS;
}
