// The ops that lowered graphs call on CPU: they look up the kernel generated for their arguments
// and run it, with no Python on the way but for the first call of a kind.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <sstream>
#include <string>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// A compiled function, and the number of rows up to which it is the one to use: for a block the
// form for few rows, for a linear layer this kernel rather than PyTorch's.
struct Kernel {
  void* run = nullptr;
  int64_t few = 0;
};
// Given what a kernel is constant in, build it: `kind` and its fields, comma-separated.
typedef void (*Resolve)(const char* kind, const char* fields, Kernel* found);
static Resolve resolve = nullptr;
extern "C" void skimp_resolve_with(Resolve function) { resolve = function; }

using Key = std::array<int64_t, 10>;
static std::vector<std::pair<Key, Kernel>> known;
static std::shared_mutex known_lock;

extern "C" void skimp_forget() {
  std::unique_lock<std::shared_mutex> writing(known_lock);
  known.clear();
}

static Kernel find(const char* kind, const Key& key) {
  {
    std::shared_lock<std::shared_mutex> reading(known_lock);
    for (auto& [k, kernel] : known)
      if (k == key) return kernel;
  }
  // No lock is held here: the answer comes from Python, where another thread may be asking too.
  Kernel found;
  std::ostringstream fields;
  for (size_t i = 1; i < key.size(); i++) fields << (i > 1 ? "," : "") << key[i];
  if (resolve) resolve(kind, fields.str().c_str(), &found);
  std::unique_lock<std::shared_mutex> writing(known_lock);
  known.emplace_back(key, found);
  return found;
}

static const char* const ACTS[] = {"identity", "relu",       "gelu", "gelu_tanh",
                                   "silu",     "gelu_quick", "relu2", "scored"};
static int64_t index_of(const std::string& act) {
  for (size_t i = 0; i < std::size(ACTS); i++)
    if (act == ACTS[i]) return int64_t(i);
  STD_TORCH_CHECK(false, "skimp_cpu::dynk_ffn: act is '", act, "', which no kernel computes");
  return -1;
}

static float wide(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static float value_of(const Tensor& tau) {
  STD_TORCH_CHECK(tau.is_cpu() && tau.numel() == 1, "skimp_cpu::dynk_ffn: tau must be one number");
  switch (tau.scalar_type()) {
    case ScalarType::Float: return *(const float*)tau.const_data_ptr();
    case ScalarType::Double: return float(*(const double*)tau.const_data_ptr());
    case ScalarType::BFloat16: return wide(*(const uint16_t*)tau.const_data_ptr());
    default: STD_TORCH_CHECK(false, "skimp_cpu::dynk_ffn: tau is neither float32 nor bfloat16");
  }
  return 0;
}

static Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
static Optional dense(const Optional& t) { return t ? Optional(dense(*t)) : t; }
static const void* pointer(const Tensor& t) { return t.const_data_ptr(); }
static const void* pointer(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

static void gather(const Tensor& w) { gather(pointer(w), w.numel() * w.element_size()); }

// By name the dispatcher takes ten times as long, which small models notice.
static Tensor empty_like_rows_of(const Tensor& x, int64_t columns) {
  const int64_t dims = x.dim();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(dims);
  shape.back() = columns;
  for (int64_t i = dims, stride = 1; i--; stride *= shape[i]) strides[i] = stride;
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Kernels trust their arguments, so these are checked here.
static void check(const Tensor& x, const Tensor& t, std::initializer_list<int64_t> shape,
                  const char* op, const char* name) {
  bool same = t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) same = same && t.size(i++) == n;
  STD_TORCH_CHECK(same, op, ": ", name, " has another shape, dtype or device than x asks for");
}

static Tensor aten_linear(const Tensor& x, const Tensor& w, const Optional& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

static void weight(float* h, float score, float tau) {
  *h = std::fabs(score) < tau ? 0 : score * *h;
}
static void weight(uint16_t* h, uint16_t score, float tau) {
  float value = wide(*h);
  weight(&value, wide(score), tau);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool nan = value != value;
  *h = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, even
}

// Many rows of weighted experts of one neuron: dense products, and zeros for what rests.
static Tensor masked(const Tensor& x, const Tensor& scores, float tau, const Tensor& w_in,
                     const Optional& b_in, const Tensor& w_out, const Optional& b_out) {
  const Tensor h = aten_linear(x, w_in, b_in);
  const int64_t n = h.numel();
  void* p = h.mutable_data_ptr();
  const bool narrow = h.scalar_type() == ScalarType::BFloat16;
#pragma omp parallel for num_threads(int(torch::stable::get_num_threads())) if (n > 32768)
  for (int64_t i = 0; i < n; i++)
    if (narrow) weight((uint16_t*)p + i, ((const uint16_t*)pointer(scores))[i], tau);
    else weight((float*)p + i, ((const float*)pointer(scores))[i], tau);
  return aten_linear(h, torch::stable::transpose(w_out, 0, 1), b_out);
}

Tensor dynk_ffn(Tensor x_, Tensor scores_, Tensor tau, Tensor w_in_, Optional b_in_,
                Optional w_gate_, Optional b_gate_, Tensor w_out_, Optional b_out_,
                int64_t expert_size, std::string act) {
  const char* op = "skimp_cpu::dynk_ffn";
  const Tensor x = dense(x_), scores = dense(scores_), w_in = dense(w_in_), w_out = dense(w_out_);
  const Optional b_in = dense(b_in_), w_gate = dense(w_gate_), b_gate = dense(b_gate_),
                 b_out = dense(b_out_);
  STD_TORCH_CHECK(x.dim() > 0 && w_in.dim() == 2 && w_out.dim() == 2, op, ": a weight is no matrix");
  const int64_t d_ff = w_in.size(0), d = w_in.size(1), d_out = w_out.size(1);
  check(x, w_in, {d_ff, x.size(-1)}, op, "w_in");
  check(x, w_out, {d_ff, d_out}, op, "w_out");
  if (b_in) check(x, *b_in, {d_ff}, op, "b_in");
  if (w_gate) check(x, *w_gate, {d_ff, d}, op, "w_gate");
  if (b_gate) check(x, *b_gate, {d_ff}, op, "b_gate");
  if (b_out) check(x, *b_out, {d_out}, op, "b_out");
  const int64_t rows = x.numel() / d;
  STD_TORCH_CHECK(scores.is_cpu() && scores.scalar_type() == x.scalar_type() &&
                      scores.size(-1) * expert_size == d_ff &&
                      scores.numel() == rows * scores.size(-1),
                  op, ": scores do not fit x and the experts");
  const Kernel kernel =
      find("dynk_ffn", {0, index_of(act), w_gate.has_value(), b_in.has_value(),
                        b_gate.has_value(), b_out.has_value(), expert_size, d, d_ff,
                        d_out * 2 + (x.scalar_type() == ScalarType::BFloat16)});
  STD_TORCH_CHECK(kernel.run, op, ": there is no kernel for such a block");
  if (act == "scored" && expert_size == 1 && rows > kernel.few)
    return masked(x, scores, value_of(tau), w_in, b_in, w_out, b_out);
  gather(w_in), gather(w_out);
  if (w_gate) gather(*w_gate);
  Tensor y = empty_like_rows_of(x, d_out);
  typedef int (*Run)(const void*, const void*, float, const void*, const void*, const void*,
                     const void*, const void*, const void*, void*, int64_t, int64_t, int32_t);
  const int failed = ((Run)kernel.run)(
      pointer(x), pointer(scores), value_of(tau), pointer(w_in), pointer(b_in), pointer(w_gate),
      pointer(b_gate), pointer(w_out), pointer(b_out), y.mutable_data_ptr(), rows, kernel.few,
      int32_t(torch::stable::get_num_threads()));
  STD_TORCH_CHECK(!failed, op, ": no memory for the scratch of ", rows, " rows");
  return y;
}

// Layers of one shape that read the same x; `b_` holds a bias for each of them, or nothing.
std::vector<Tensor> linears(Tensor x_, std::vector<Tensor> w_, std::vector<Tensor> b_) {
  const char* op = "skimp_cpu::linear";
  const size_t count = w_.size();
  STD_TORCH_CHECK(count && x_.dim() > 0 && w_[0].dim() == 2, op, ": w is no matrix");
  STD_TORCH_CHECK(b_.empty() || b_.size() == count, op, ": not as many b as w");
  const int64_t d = w_[0].size(1), d_out = w_[0].size(0), rows = d ? x_.numel() / d : 0;
  for (size_t i = 0; i < count; i++) {
    check(x_, w_[i], {d_out, x_.size(-1)}, op, "w");
    if (!b_.empty()) check(x_, b_[i], {d_out}, op, "b");
  }
  const Kernel kernel = find("linear", {1, d, d_out, !b_.empty(),
                                        x_.scalar_type() == ScalarType::BFloat16});
  std::vector<Tensor> y;
  if (!kernel.run || rows > kernel.few || rows == 0) {
    for (size_t i = 0; i < count; i++)
      y.push_back(aten_linear(x_, w_[i], b_.empty() ? Optional() : Optional(b_[i])));
    return y;
  }
  const Tensor x = dense(x_);
  std::vector<const void*> w, b(count);
  std::vector<void*> to;
  for (size_t i = 0; i < count; i++) {
    w_[i] = dense(w_[i]);
    w.push_back(pointer(w_[i]));
    gather(w_[i]);
    if (!b_.empty()) {
      b_[i] = dense(b_[i]);
      b[i] = pointer(b_[i]);
    }
    y.push_back(empty_like_rows_of(x, d_out));
    to.push_back(y[i].mutable_data_ptr());
  }
  typedef int (*Run)(const void*, const void* const*, const void* const*, void* const*, int64_t,
                     int64_t, int32_t);
  const int failed =
      ((Run)kernel.run)(pointer(x), w.data(), b.data(), to.data(), int64_t(count), rows,
                        int32_t(torch::stable::get_num_threads()));
  STD_TORCH_CHECK(!failed, op, ": no memory for the scratch of ", rows, " rows");
  return y;
}

Tensor linear(Tensor x, Tensor w, Optional b) {
  return linears(x, {w}, b ? std::vector<Tensor>{*b} : std::vector<Tensor>{})[0];
}

// In place, with PyTorch's treatment of NaN.
template <class F32, class BF16>
static void each(const Tensor& t, F32 f, BF16 g) {
  const int64_t n = t.numel();
  void* p = t.mutable_data_ptr();
  const bool narrow = t.scalar_type() == ScalarType::BFloat16;
#pragma omp parallel for num_threads(int(torch::stable::get_num_threads())) if (n > 32768)
  for (int64_t i = 0; i < n; i++)
    if (narrow) ((uint16_t*)p)[i] = g(((uint16_t*)p)[i]);
    else ((float*)p)[i] = f(((float*)p)[i]);
}

// A block with its router, Linear -> ReLU -> Linear -> abs, in one call.
Tensor routed_ffn(Tensor x, Tensor down, Tensor up, Tensor tau, Tensor w_in, Optional b_in,
                  Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out,
                  int64_t expert_size, std::string act) {
  const Tensor h = linear(x, down, std::nullopt);
  each(h, [](float v) { return v < 0 ? 0.0f : v; },
       [](uint16_t v) { return uint16_t((v & 0x8000) && (v & 0x7fff) <= 0x7f80 ? 0 : v); });
  const Tensor scores = linear(h, up, std::nullopt);
  each(scores, [](float v) { return std::fabs(v); },
       [](uint16_t v) { return uint16_t(v & 0x7fff); });
  return dynk_ffn(x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act);
}

STABLE_TORCH_LIBRARY(skimp_cpu, m) {
  m.def(
      "dynk_ffn(Tensor x, Tensor scores, Tensor tau, Tensor w_in, Tensor? b_in, Tensor? w_gate, "
      "Tensor? b_gate, Tensor w_out, Tensor? b_out, int expert_size, str act) -> Tensor");
  m.def(
      "routed_ffn(Tensor x, Tensor down, Tensor up, Tensor tau, Tensor w_in, Tensor? b_in, "
      "Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out, int expert_size, str act) -> "
      "Tensor");
  m.def("linear(Tensor x, Tensor w, Tensor? b) -> Tensor");
  m.def("linears(Tensor x, Tensor[] w, Tensor[] b) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(skimp_cpu, CPU, m) {
  m.impl("dynk_ffn", TORCH_BOX(&dynk_ffn));
  m.impl("routed_ffn", TORCH_BOX(&routed_ffn));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linears", TORCH_BOX(&linears));
}
