/* Hosts one CPU kernel without TVM: reads a call from a file, runs it, writes the output.
 *
 * usage: kernel_host CALL OUTPUT TASKS PLACE
 * TASKS: number of tasks that a parallel launch is cut into; negative = the same number, last one first.
 * PLACE: end = each tensor ends where an unreadable page begins; start = it begins where one ends.
 * Prints the largest number of workspace bytes that were held at one time.
 *
 * CALL holds 9 tensors, then 5 int64 and 2 double. A tensor: int32 ndim, code, bits, writable; int64 shape[ndim], strides[ndim], offset of element
 * 0 in bytes, size in bytes; then that many bytes.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>

int KERNEL(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
extern void *__TVMBackendParallelLaunch, *__TVMBackendAllocWorkspace, *__TVMBackendFreeWorkspace;

typedef struct { void* sync; int32_t tasks; } Environment;
typedef int (*Task)(int, Environment*, void*);

static int tasks = 1, backwards = 0;
static uint64_t held = 0, most = 0;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) if (parts[i]) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static int launch(Task task, void* data, int requested) {
  Environment environment = {0, requested > 0 ? requested : tasks};
  for (int i = 0; i < environment.tasks; ++i) {
    int failed = task(backwards ? environment.tasks - 1 - i : i, &environment, data);
    if (failed) return failed;
  }
  return 0;
}

/* The size goes in front, 64 bytes ahead, so that alignment stays. */
static void* allocate(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  char* block = 0;
  if (posix_memalign((void**)&block, 64, bytes + 64)) return 0;
  memset(block + 64, 0xff, bytes); /* NaN in every format */
  *(uint64_t*)block = bytes;
  held += bytes;
  if (held > most) most = held;
  return block + 64;
}

static int release(int device, int id, void* pointer) {
  (void)device, (void)id;
  char* block = (char*)pointer - 64;
  held -= *(uint64_t*)block;
  free(block);
  return 0;
}

static void read_exactly(FILE* file, void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, file) != bytes) { fputs("the call's file is truncated\n", stderr); exit(3); }
}

static char* guarded(size_t bytes, int at_end) {
  size_t page = 65536, body = (bytes + page - 1) / page * page + page;
  char* base = mmap(0, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) { perror("mmap"); exit(3); }
  if (mprotect(base, page, PROT_NONE) || mprotect(base + page + body, page, PROT_NONE)) { perror("mprotect"); exit(3); }
  return at_end ? base + page + body - bytes : base + page;
}

int main(int count, char** words) {
  if (count != 5) return 2;
  tasks = atoi(words[3]);
  if (tasks < 0) backwards = 1, tasks = -tasks;
  int at_end = !strcmp(words[4], "end");
  FILE* file = fopen(words[1], "rb");
  if (!file) { perror(words[1]); return 3; }
  static DLTensor tensors[9];
  static int64_t shapes[9][4], strides[9][4];
  TVMFFIAny arguments[16], result;
  memset(arguments, 0, sizeof arguments);
  memset(&result, 0, sizeof result);
  char* output = 0;
  int64_t output_bytes = 0;
  for (int i = 0; i < 9; ++i) {
    int32_t head[4];
    int64_t place[2];
    read_exactly(file, head, sizeof head);
    read_exactly(file, shapes[i], 8 * head[0]);
    read_exactly(file, strides[i], 8 * head[0]);
    read_exactly(file, place, sizeof place);
    char* memory = guarded(place[1], at_end);
    read_exactly(file, memory, place[1]);
    if (head[3]) output = memory, output_bytes = place[1];
    tensors[i].data = memory + place[0];
    tensors[i].device.device_type = kDLCPU;
    tensors[i].ndim = head[0];
    tensors[i].dtype.code = head[1];
    tensors[i].dtype.bits = head[2];
    tensors[i].dtype.lanes = 1;
    tensors[i].shape = shapes[i];
    tensors[i].strides = strides[i];
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &tensors[i];
  }
  for (int i = 9; i < 14; ++i) arguments[i].type_index = kTVMFFIInt, read_exactly(file, &arguments[i].v_int64, 8);
  for (int i = 14; i < 16; ++i) arguments[i].type_index = kTVMFFIFloat, read_exactly(file, &arguments[i].v_float64, 8);
  fclose(file);
  __TVMBackendParallelLaunch = (void*)launch;
  __TVMBackendAllocWorkspace = (void*)allocate;
  __TVMBackendFreeWorkspace = (void*)release;
  int failed = KERNEL(0, arguments, 16, &result);
  if (failed) return 4;
  FILE* out = fopen(words[2], "wb");
  if (!out || fwrite(output, 1, output_bytes, out) != (size_t)output_bytes || fclose(out)) { perror(words[2]); return 3; }
  printf("%llu\n", (unsigned long long)most);
  return 0;
}
