/* A CUDA runtime with one device that computes nothing: launches return at once, and whatever the host reads from it is zero.
 *
 * Device memory is addresses that the host can neither read nor write: a host function that is given a tensor of the device
 * crashes, as with a real GPU. Only what has to return a value is here; test_null_gpu.py makes the other functions, which
 * return 0.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_SUPPORTED = 801 };
enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2 };
enum { WARP = 32, THREADS = 1024, MANY = 2048 };

/* Addresses are never reused: torch caches what it frees. */
typedef struct { char *start, *end; size_t size; int protection; } Arena;
static Arena device = {.size = 1ull << 40, .protection = PROT_NONE};
static Arena pinned = {.size = 1ull << 36, .protection = PROT_READ | PROT_WRITE};

static int take(Arena *arena, void **pointer, size_t bytes) {
  if (!arena->start) {
    void *start = mmap(NULL, arena->size, arena->protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    arena->start = arena->end = start;
  }
  bytes = (bytes + 4095) & ~(size_t)4095;
  if (bytes > arena->size - (size_t)(arena->end - arena->start)) return OUT_OF_MEMORY;
  *pointer = arena->end;
  arena->end += bytes;
  return SUCCESS;
}

static int is_in(const Arena *arena, const void *pointer) {
  return (const char *)pointer >= arena->start && (const char *)pointer < arena->end;
}

int cudaMalloc(void **pointer, size_t bytes) { return take(&device, pointer, bytes); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return take(&pinned, pointer, bytes); }
int cudaMallocHost(void **pointer, size_t bytes) { return take(&pinned, pointer, bytes); }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 1ull << 36; return SUCCESS; }

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  if (is_in(&device, to)) return SUCCESS;
  if (is_in(&device, from)) memset(to, 0, bytes);
  else memmove(to, from, bytes);
  return SUCCESS;
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return cudaMemcpyAsync(to, from, bytes, kind, NULL); }

struct attributes { int type, device; void *device_pointer, *host_pointer; };
int cudaPointerGetAttributes(struct attributes *attributes, const void *pointer) {
  int type = is_in(&pinned, pointer) ? HOST : is_in(&device, pointer) ? DEVICE : UNREGISTERED;
  *attributes = (struct attributes){type, 0, type ? (void *)pointer : NULL, type == HOST ? (void *)pointer : NULL};
  return SUCCESS;
}

int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *number) { *number = 0; return SUCCESS; }
int cudaSetDevice(int number) { return number ? INVALID_DEVICE : SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 99000; return SUCCESS; }
int cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return SUCCESS; }
int cuDevicePrimaryCtxGetState(int number, unsigned *flags, int *active) { *flags = 0; *active = 1; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = &device; return SUCCESS; }

/* The fields up to `minor` lie alike in CUDA 12 and 13; those after it are sizes, or switches that torch does not ask for. */
struct properties {
  char name[256], uuid[16], luid[8];
  unsigned node;
  size_t global_memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
  size_t constant_memory;
  int major, minor;
  int others[80];
};
int cudaGetDeviceProperties(struct properties *p, int number) {
  if (number) return INVALID_DEVICE;
  *p = (struct properties){.name = "null device", .global_memory = 1ull << 36, .shared_memory = 48 << 10, .registers = 1 << 16,
                           .warp = WARP, .pitch = 1 << 30, .threads = THREADS, .block = {THREADS, THREADS, 64},
                           .grid = {1 << 30, 65535, 65535}, .constant_memory = 1 << 16, .major = 9, .minor = 0};
  for (int n = 0; n < 80; n++) p->others[n] = MANY;
  return SUCCESS;
}
int cudaGetDeviceProperties_v2(struct properties *p, int number) { return cudaGetDeviceProperties(p, number); }
/* Of the attributes, 10 is the warp's size, and 75 and 76 the compute capability. */
int cudaDeviceGetAttribute(int *value, int attribute, int number) {
  *value = attribute == 10 ? WARP : attribute == 75 ? 9 : attribute == 76 ? 0 : THREADS;
  return SUCCESS;
}
/* The fields after the sizes of memory: threads a block, registers, versions of the code. */
struct function { size_t memory[3]; int threads, registers, ptx, binary, others[20]; };
int cudaFuncGetAttributes(struct function *f, const void *kernel) {
  memset(f, 0, offsetof(struct function, others));
  f->threads = THREADS;
  f->ptx = f->binary = 90;
  return SUCCESS;
}
/* The arguments after those that are used are left out. */
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 2; return SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 2; return SUCCESS; }

static int handle(void **object) { return (*object = malloc(1)) ? SUCCESS : OUT_OF_MEMORY; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return handle(stream); }
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 1; return SUCCESS; }
int cudaGetDriverEntryPoint(const char *name, void **function) { *function = NULL; return NOT_SUPPORTED; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function) { *function = NULL; return NOT_SUPPORTED; }
const char *cudaGetErrorName(int error) { return "an error of the null device"; }
const char *cudaGetErrorString(int error) { return "an error of the null device"; }

int cublasCreate_v2(void **object) { return handle(object); }
int cublasGetMathMode(void *object, int *mode) { *mode = 0; return SUCCESS; }
int cublasGetPointerMode_v2(void *object, int *mode) { *mode = 0; return SUCCESS; }
int cublasLtMatmulDescCreate(void **object) { return handle(object); }
int cublasLtMatmulPreferenceCreate(void **object) { return handle(object); }
int cublasLtMatrixLayoutCreate(void **object) { return handle(object); }
int cublasLtMatmulAlgoGetHeuristic(
    void *blas, void *a, void *b, void *c, void *d, void *e, void *preference, int most, void *results, int *count) {
  *count = 1;
  return SUCCESS;
}
