// A GPU that computes nothing. no_gpu.py builds this and says what it is for.
//
// It answers what PyTorch asks of CUDA's runtime, of its driver and of cuBLAS. Memory is real, but
// mapped only where something is copied to it. Kernels and products are counted, and not run.
// Whatever has no answer here gets 0, which is "success": no_gpu.py writes those answers.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

using std::string;
typedef cudaError_t E;
#define ANSWER extern "C" __attribute__((visibility("default")))
const E OK = cudaSuccess;

// ---- what is counted

struct Counts {
  std::mutex lock;
  std::unordered_map<const void *, string> kernels;  // by the address that launches them
  std::map<string, long> seen;
  std::map<uintptr_t, size_t> device, pinned;  // memory: where it begins, bytes
  size_t used = 0;
};

Counts &counts() {  // made when it is first asked for: kernels register before main begins
  static Counts *made = new Counts;
  return *made;
}

void count(const string &name) {
  std::lock_guard<std::mutex> hold(counts().lock);
  counts().seen[name]++;
}

E launch(const string &kernel) {
  count("launches");
  count("kernel " + kernel);
  return OK;
}

E product(long m, long n, long k, long batch) {
  char shape[100];
  snprintf(shape, sizeof shape, "product %ld %ld %ld %ld", m, n, k, batch);
  count("launches");
  count(shape);
  return OK;
}

ANSWER void no_gpu_reset() {
  std::lock_guard<std::mutex> hold(counts().lock);
  counts().seen.clear();
}

ANSWER const char *no_gpu_report() {  // a line for each name: its number, a tab, the name
  static string text;
  std::lock_guard<std::mutex> hold(counts().lock);
  text.clear();
  for (auto &[name, number] : counts().seen) text += std::to_string(number) + "\t" + name + "\n";
  return text.c_str();
}

// Each byte of the small numbers that come back. Of 63 it is 0.75 in fp32 and 0.0005 in fp64.
int number = 0;
ANSWER void no_gpu_numbers(int byte) { number = byte; }

// ---- the device, an H100

const size_t MEMORY = 80ull << 30, LEFT_OUT = 1ull << 30;  // the driver keeps some for itself

ANSWER E cudaGetDevice(int *device) { return *device = 0, OK; }
ANSWER E cudaGetDeviceCount(int *number) { return *number = 1, OK; }
ANSWER E cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, OK; }
ANSWER E cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, OK; }
ANSWER E cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, OK; }
ANSWER const char *cudaGetErrorString(E) { return "a GPU that computes nothing"; }
ANSWER const char *cudaGetErrorName(E) { return "no_gpu"; }

ANSWER E cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "H100 that computes nothing");
  p->major = 9;
  p->totalGlobalMem = MEMORY;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 50 << 20;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->textureAlignment = 512;
  return OK;
}

int attribute(int which) {  // the driver has the same numbers
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxGridDimX: return 2147483647;
  }
  return 0;
}

ANSWER E cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
  return *value = attribute(which), OK;
}

// ---- memory

ANSWER E cudaMalloc(void **where, size_t bytes) {
  std::lock_guard<std::mutex> hold(counts().lock);
  *where = nullptr;
  if (counts().used + bytes > MEMORY - LEFT_OUT) return cudaErrorMemoryAllocation;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *begin = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (begin == MAP_FAILED) return cudaErrorMemoryAllocation;
  counts().device[uintptr_t(*where = begin)] = bytes;
  counts().used += bytes;
  return OK;
}

ANSWER E cudaFree(void *begin) {
  std::lock_guard<std::mutex> hold(counts().lock);
  auto held = counts().device.find(uintptr_t(begin));
  if (held == counts().device.end()) return OK;
  munmap(begin, held->second);
  counts().used -= held->second;
  counts().device.erase(held);
  return OK;
}

ANSWER E cudaHostAlloc(void **where, size_t bytes, unsigned) {
  *where = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::lock_guard<std::mutex> hold(counts().lock);
  counts().pinned[uintptr_t(*where)] = bytes;
  return OK;
}

ANSWER E cudaFreeHost(void *begin) {
  std::lock_guard<std::mutex> hold(counts().lock);
  counts().pinned.erase(uintptr_t(begin));
  free(begin);
  return OK;
}

bool lies_in(const std::map<uintptr_t, size_t> &memory, const void *place) {
  auto next = memory.upper_bound(uintptr_t(place));
  if (next == memory.begin()) return false;
  auto [begin, bytes] = *--next;
  return uintptr_t(place) < begin + bytes;
}

ANSWER E cudaPointerGetAttributes(cudaPointerAttributes *about, const void *place) {
  std::lock_guard<std::mutex> hold(counts().lock);
  memset(about, 0, sizeof *about);
  bool on_device = lies_in(counts().device, place), pinned = lies_in(counts().pinned, place);
  about->type = on_device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost
                                                          : cudaMemoryTypeUnregistered;
  if (on_device || pinned) about->devicePointer = const_cast<void *>(place);
  if (pinned) about->hostPointer = const_cast<void *>(place);
  return OK;
}

ANSWER E cudaMemGetInfo(size_t *left, size_t *all) {
  *all = MEMORY;
  *left = MEMORY - LEFT_OUT - counts().used;
  return OK;
}

ANSWER E cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                         cudaStream_t) {
  if (kind == cudaMemcpyHostToDevice) {
    std::unique_lock<std::mutex> hold(counts().lock);
    bool pinned = lies_in(counts().pinned, from);
    hold.unlock();
    count(pinned ? "copies to the GPU" : "copies to the GPU that wait");
    memcpy(to, from, bytes);
  } else if (kind == cudaMemcpyDeviceToHost) {
    count("copies from the GPU");
    memset(to, bytes <= 256 ? number : 0, bytes);
  } else {
    count("copies on the GPU");
  }
  return OK;
}

ANSWER E cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

ANSWER E cudaGetSymbolAddress(void **where, const void *) {
  return *where = calloc(1, 1 << 16), OK;
}

// ---- streams, events, graphs

template <class Handle>
E made(Handle *handle) {
  return *handle = Handle(calloc(1, 256)), OK;
}

bool capturing = false;
const cudaStreamCaptureStatus NONE = cudaStreamCaptureStatusNone;

cudaStreamCaptureStatus status() { return capturing ? cudaStreamCaptureStatusActive : NONE; }

E wait(const char *name) {
  if (capturing) fprintf(stderr, "no_gpu: a wait inside a recording\n");
  count(name);
  return OK;
}

ANSWER E cudaStreamSynchronize(cudaStream_t) { return wait("waits"); }
ANSWER E cudaEventSynchronize(cudaEvent_t) { return wait("waits"); }
ANSWER E cudaDeviceSynchronize() { return wait("waits for the whole device"); }
ANSWER E cudaStreamCreate(cudaStream_t *s) { return made(s); }
ANSWER E cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return made(s); }
ANSWER E cudaDeviceGetStreamPriorityRange(int *a, int *b) { return *a = 0, *b = -5, OK; }
ANSWER E cudaStreamGetPriority(cudaStream_t, int *p) { return *p = 0, OK; }
ANSWER E cudaEventCreate(cudaEvent_t *e) { return made(e); }
ANSWER E cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return made(e); }
ANSWER E cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, OK; }

ANSWER E cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return capturing = true, OK;
}
ANSWER E cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
  return capturing = false, made(graph);
}
ANSWER E cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *is) {
  return *is = status(), OK;
}
ANSWER E cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *is,
                                  unsigned long long *id, cudaGraph_t *graph,
                                  const cudaGraphNode_t **, const cudaGraphEdgeData **,
                                  size_t *dependencies) {
  *is = status();
  if (id) *id = 7;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = 0;
  return OK;
}
ANSWER E cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *n) { return *n = 1, OK; }
ANSWER E cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t, unsigned long long) {
  return made(e);
}
ANSWER E cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return count("graphs played"), OK; }

// ---- kernels that nvcc compiled

E launch_at(const void *address) {
  std::unique_lock<std::mutex> hold(counts().lock);
  auto known = counts().kernels.find(address);
  string name = known == counts().kernels.end() ? "?" : known->second;
  hold.unlock();
  return launch(name);
}

ANSWER void **__cudaRegisterFatBinary(void *) { return (void **)malloc(8); }
ANSWER void __cudaRegisterFunction(void **, const char *address, char *, const char *name, int,
                                   void *, void *, void *, void *, int *) {
  std::lock_guard<std::mutex> hold(counts().lock);
  counts().kernels[address] = name;
}
ANSWER E __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = *block = dim3();
  *shared = 0;
  *(void **)stream = nullptr;
  return OK;
}
ANSWER E __cudaGetKernel(cudaKernel_t *kernel, const void *address) {
  return *kernel = cudaKernel_t(address), OK;
}
ANSWER E __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch_at(kernel);
}
ANSWER E cudaLaunchKernel(const void *address, dim3, dim3, void **, size_t, cudaStream_t) {
  return launch_at(address);
}
ANSWER E cudaLaunchCooperativeKernel(const void *address, dim3, dim3, void **, size_t,
                                     cudaStream_t) {
  return launch_at(address);
}
ANSWER E cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *address, void **) {
  return launch_at(address);
}
ANSWER E cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  return function(data), OK;
}
ANSWER E cudaFuncGetAttributes(cudaFuncAttributes *about, const void *) {
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = 32;
  about->binaryVersion = about->ptxVersion = 90;
  return OK;
}
ANSWER E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) {
  return *n = 2, OK;
}
ANSWER E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int, size_t,
                                                                unsigned) {
  return *n = 2, OK;
}

// ---- the driver, which Triton's kernels are started by

ANSWER int cuDeviceGet(int *device, int) { return *device = 0; }
ANSWER int cuDeviceGetCount(int *number) { return *number = 1, 0; }
ANSWER int cuDeviceGetAttribute(int *value, int which, int) {
  return *value = attribute(which), 0;
}
ANSWER int cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
ANSWER int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, 0;
}
ANSWER int cuDevicePrimaryCtxRetain(void **context, int) { return made(context); }
ANSWER int cuCtxGetCurrent(void **context) { return made(context); }
ANSWER int cuCtxGetDevice(int *device) { return *device = 0; }
ANSWER int cuCtxGetLimit(size_t *value, int) { return *value = 0, 0; }
ANSWER int cuGetErrorString(int, const char **text) { return *text = "no_gpu", 0; }
ANSWER int cuModuleLoad(void **module, const char *) { return made(module); }
ANSWER int cuModuleLoadData(void **module, const void *) { return made(module); }
ANSWER int cuModuleLoadDataEx(void **module, const void *, unsigned, void *, void *) {
  return made(module);
}
ANSWER int cuModuleGetFunction(void **function, void *, const char *name) {
  return *function = new string(name), 0;
}
ANSWER int cuFuncGetAttribute(int *value, int which, void *) {
  return *value = which == 0 ? 1024 : which == 4 ? 32 : 0, 0;  // threads of a block, registers
}
ANSWER int cuLaunchKernel(void *function) { return launch(*(string *)function); }
ANSWER int cuLaunchKernelEx(void *, void *function) { return launch(*(string *)function); }
ANSWER int cuPointerGetAttribute(void *value, int, uintptr_t place) {
  return *(uintptr_t *)value = place, 0;
}
ANSWER E cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                          unsigned long long,
                                          cudaDriverEntryPointQueryResult *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, "cuInit");  // which answers 0
  if (found) *found = cudaDriverEntryPointSuccess;
  return OK;
}

// ---- cuBLAS

struct Layout {
  long rows, columns;
};
struct Choice {  // cublasLtMatmulHeuristicResult_t
  unsigned long long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

ANSWER int cublasCreate_v2(void **handle) { return made(handle); }
ANSWER int cublasGetMathMode(void *, int *mode) { return *mode = 0; }
ANSWER int cublasGetPointerMode_v2(void *, int *mode) { return *mode = 0; }
ANSWER size_t cublasLtGetVersion() { return 130100; }
ANSWER int cublasGemmEx(void *, int, int, int m, int n, int k, ...) { return product(m, n, k, 1); }
ANSWER int cublasSgemm_v2(void *, int, int, int m, int n, int k, ...) {
  return product(m, n, k, 1);
}
ANSWER int cublasDgemm_v2(void *, int, int, int m, int n, int k, ...) {
  return product(m, n, k, 1);
}
ANSWER int cublasSgemmEx(void *, int, int, int m, int n, int k, ...) { return product(m, n, k, 1); }
ANSWER int cublasGemmStridedBatchedEx(void *, int, int, int m, int n, int k, const void *,
                                      const void *, int, int, long long, const void *, int, int,
                                      long long, const void *, void *, int, int, long long,
                                      int batch, int, int) {
  return product(m, n, k, batch);
}
ANSWER int cublasSgemmStridedBatched(void *, int, int, int m, int n, int k, const float *,
                                     const float *, int, long long, const float *, int, long long,
                                     const float *, float *, int, long long, int batch) {
  return product(m, n, k, batch);
}
ANSWER int cublasLtMatmulDescCreate(void **handle, int, int) { return made(handle); }
ANSWER int cublasLtMatmulPreferenceCreate(void **handle) { return made(handle); }
ANSWER int cublasLtMatrixLayoutCreate(Layout **layout, int, unsigned long long rows,
                                      unsigned long long columns, long long) {
  return *layout = new Layout{long(rows), long(columns)}, 0;
}
ANSWER int cublasLtMatrixLayoutDestroy(Layout *layout) { return delete layout, 0; }
ANSWER int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *,
                                          int, Choice *choices, int *number) {
  memset(choices, 0, sizeof *choices);
  return *number = 1, 0;
}
ANSWER int cublasLtMatmul(void *, void *, const void *, const void *, Layout *a, const void *,
                          Layout *, const void *, const void *, void *, void *, Layout *d, ...) {
  return product(d->rows, d->columns, a->rows == d->rows ? a->columns : a->rows, 1);
}
