/* A plain CPU kernel with the ABI of docs/operator.md, to test the ONNX Runtime library without TVM.
 * Compile with -DSYMBOL=..., -DELEMENT_BITS=32 or 16, and -DBRAIN for bfloat16. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void* sync_handle;
  int32_t task_count;
} ParallelGroup;
typedef int (*ParallelBody)(int, ParallelGroup*, void*);

__attribute__((weak)) void* __TVMBackendParallelLaunch;

static double load(const DLTensor* tensor, int64_t index) {
#if ELEMENT_BITS == 32
  float value;
  memcpy(&value, (const char*)tensor->data + 4 * index, 4);
  return value;
#elif defined(BRAIN)
  uint32_t bits = 0;
  float value;
  memcpy((char*)&bits + 2, (const char*)tensor->data + 2 * index, 2);
  memcpy(&value, &bits, 4);
  return value;
#else
  _Float16 value;
  memcpy(&value, (const char*)tensor->data + 2 * index, 2);
  return (double)value;
#endif
}

static void store(const DLTensor* tensor, int64_t index, double number) {
#if ELEMENT_BITS == 32
  float value = (float)number;
  memcpy((char*)tensor->data + 4 * index, &value, 4);
#elif defined(BRAIN)
  float value = (float)number;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  memcpy((char*)tensor->data + 2 * index, (char*)&bits + 2, 2);
#else
  _Float16 value = (_Float16)number;
  memcpy((char*)tensor->data + 2 * index, &value, 2);
#endif
}

static int64_t at4(const DLTensor* t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return a * t->strides[0] + b * t->strides[1] + c * t->strides[2] + d * t->strides[3];
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

typedef struct {
  const DLTensor *query, *key, *value, *key_padding, *segments, *sinks, *bias, *alibi, *output;
  int64_t left, right, offset, chunk, zeroed;
  double scale, softcap;
} Call;

static int visible(const Call* c, int64_t b, int64_t p, int64_t k) {
  const int64_t keys = c->key->shape[2];
  if (k - p < -c->left || k - p > c->right) return 0;
  if (c->chunk && floor_div(p, c->chunk) != floor_div(k, c->chunk)) return 0;
  if (!c->segments->shape[0]) return 1;
  const int64_t* segments = (const int64_t*)c->segments->data + b * keys;
  return p >= 0 && p < keys && segments[p] == segments[k];
}

static double score(const Call* c, int64_t b, int64_t h, int64_t q, int64_t k) {
  const int64_t group = c->query->shape[1] / c->key->shape[1], p = q + c->offset;
  double dot = 0;
  for (int64_t d = 0; d < c->query->shape[3]; ++d)
    dot += load(c->query, at4(c->query, b, h, q, d)) * load(c->key, at4(c->key, b, h / group, k, d));
  dot *= c->scale;
  if (c->softcap != 0) dot = c->softcap * tanh(dot / c->softcap);
  if (c->alibi->shape[0]) dot += ((const float*)c->alibi->data)[h] * (double)(k - p);
  if (c->bias->shape[0]) dot += load(c->bias, at4(c->bias, b, h, q, k));
  return dot;
}

static void attend(const Call* c, int64_t b, int64_t h, int64_t q) {
  const int64_t keys = c->key->shape[2], group = c->query->shape[1] / c->key->shape[1], p = q + c->offset;
  double* weights = malloc(sizeof(double) * (size_t)(keys + 1));
  double highest = -INFINITY, total = 0;
  for (int64_t k = 0; k < keys; ++k) {
    const int padded = c->key_padding->shape[0] && !((const uint8_t*)c->key_padding->data)[b * keys + k];
    const int seen = visible(c, b, p, k);
    weights[k] = padded || (!seen && !c->zeroed) ? -INFINITY : seen ? score(c, b, h, q, k) : 0.0;
    if (weights[k] > highest) highest = weights[k];
  }
  weights[keys] = c->sinks->shape[0] ? load(c->sinks, h) : -INFINITY;
  if (weights[keys] > highest) highest = weights[keys];
  for (int64_t k = 0; k <= keys; ++k) {
    weights[k] = weights[k] == -INFINITY ? 0 : exp(weights[k] - highest);
    total += weights[k];
  }
  for (int64_t v = 0; v < c->value->shape[3]; ++v) {
    double sum = 0;
    for (int64_t k = 0; k < keys; ++k)
      if (weights[k] != 0) sum += weights[k] * load(c->value, at4(c->value, b, h / group, k, v));
    store(c->output, at4(c->output, b, h, q, v), total > 0 ? sum / total : 0);
  }
  free(weights);
}

static int rows(int task, ParallelGroup* group, void* closure) {
  const Call* c = closure;
  const int64_t heads = c->query->shape[1], queries = c->query->shape[2], count = c->query->shape[0] * heads * queries;
  const int64_t share = (count + group->task_count - 1) / group->task_count;
  for (int64_t row = task * share; row < count && row < (task + 1) * share; ++row)
    attend(c, row / queries / heads, row / queries % heads, row % queries);
  return 0;
}

int SYMBOL(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  const char* message = "expected 16 arguments, tensors first";
  if (count != 16 || arguments[8].type_index != kTVMFFIDLTensorPtr || arguments[9].type_index != kTVMFFIInt ||
      arguments[14].type_index != kTVMFFIFloat) {
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", &message, 1);
    return -1;
  }
  Call call;
  const DLTensor** tensors = &call.query;
  int64_t* integers = &call.left;
  for (int i = 0; i < 9; ++i) tensors[i] = arguments[i].v_ptr;
  for (int i = 0; i < 5; ++i) integers[i] = arguments[9 + i].v_int64;
  call.scale = arguments[14].v_float64;
  call.softcap = arguments[15].v_float64;
  int (*launch)(ParallelBody, void*, int) = (int (*)(ParallelBody, void*, int))__TVMBackendParallelLaunch;
  return launch(rows, &call, 0);
}
