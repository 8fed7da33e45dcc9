
// The same ops for code that AOTInductor wrote, which calls them by name: the dispatcher boxes every
// argument, and after each kernel has passed its weights through the caches that is slow.
#include <cstdarg>
#include <cstdio>

#define NAMED_(op, suffix) aoti_torch_cpu_##op##_##suffix
#define NAMED(op, suffix) NAMED_(op, suffix)
#define SHIM(op) \
  extern "C" __attribute__((visibility("default"))) AOTITorchError NAMED(op, SUFFIX)

static Tensor shared(AtenTensorHandle t) {
  AtenTensorHandle another;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &another));
  return Tensor(another);
}
static Optional shared(const AtenTensorHandle* t) { return t ? Optional(shared(*t)) : Optional(); }
static std::vector<Tensor> shared(const AtenTensorHandle* t, int64_t count) {
  std::vector<Tensor> all;
  for (int64_t i = 0; i < count; i++) all.push_back(shared(t[i]));
  return all;
}
static void hand_over(const Tensor& t, AtenTensorHandle* to) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), to));
}
template <class F>
static AOTITorchError guarded(F f) {
  try {
    f();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return AOTI_TORCH_FAILURE;
}

SHIM(dynk_ffn)(AtenTensorHandle x, AtenTensorHandle scores, AtenTensorHandle tau,
               AtenTensorHandle w_in, const AtenTensorHandle* b_in, const AtenTensorHandle* w_gate,
               const AtenTensorHandle* b_gate, AtenTensorHandle w_out,
               const AtenTensorHandle* b_out, int64_t expert_size, const char* act,
               AtenTensorHandle* y) {
  return guarded([&] {
    hand_over(dynk_ffn(shared(x), shared(scores), shared(tau), shared(w_in), shared(b_in),
                       shared(w_gate), shared(b_gate), shared(w_out), shared(b_out), expert_size,
                       act), y);
  });
}

SHIM(routed_ffn)(AtenTensorHandle x, AtenTensorHandle down, AtenTensorHandle up,
                 AtenTensorHandle tau, AtenTensorHandle w_in, const AtenTensorHandle* b_in,
                 const AtenTensorHandle* w_gate, const AtenTensorHandle* b_gate,
                 AtenTensorHandle w_out, const AtenTensorHandle* b_out, int64_t expert_size,
                 const char* act, AtenTensorHandle* y) {
  return guarded([&] {
    hand_over(routed_ffn(shared(x), shared(down), shared(up), shared(tau), shared(w_in),
                         shared(b_in), shared(w_gate), shared(b_gate), shared(w_out),
                         shared(b_out), expert_size, act), y);
  });
}

SHIM(linear)(AtenTensorHandle x, AtenTensorHandle w, const AtenTensorHandle* b,
             AtenTensorHandle* y) {
  return guarded([&] { hand_over(linear(shared(x), shared(w), shared(b)), y); });
}

// After the layers come as many places for handles as there are layers.
SHIM(linears)(AtenTensorHandle x, const AtenTensorHandle* w, int64_t count,
              const AtenTensorHandle* b, int64_t biases, ...) {
  va_list places;
  va_start(places, biases);
  const AOTITorchError failed = guarded([&] {
    for (const Tensor& y : linears(shared(x), shared(w, count), shared(b, biases)))
      hand_over(y, va_arg(places, AtenTensorHandle*));
  });
  va_end(places);
  return failed;
}
