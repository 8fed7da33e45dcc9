// The operators skimp::DynkFfn_* of ONNX Runtime, on the kernels that precede this text.
//
// ONNX Runtime hands out a table of functions that only ever grows at its end. The few that are
// called here are named by their place in it, so no header of it is needed to compile.
struct Api;
struct Context;
struct Status;
struct Value;
struct Shape;
constexpr uint32_t VERSION = 17;  // the first with a parallel loop: ONNX Runtime 1.17
constexpr int FLOAT = 1, FAILED = 1;

struct Runtime {
  const Api* api;
  template <class... A>
  Status* call(int place, A... arguments) const {
    return ((Status * (* const*)(A...)) api)[place](arguments...);
  }
  Status* fail(const char* message) const { return call(0, FAILED, message); }
  Status* input(const Context* c, size_t i, const Value** to) const { return call(90, c, i, to); }
  Status* data(const Value* value, void** to) const { return call(51, (Value*)value, to); }
  Status* output(Context* c, const std::vector<int64_t>& shape, Value** to) const {
    return call(91, c, size_t(0), shape.data(), shape.size(), to);
  }
  Status* shape(const Value* value, std::vector<int64_t>* to) const {
    Shape* found = nullptr;
    if (Status* s = call(65, value, &found)) return s;
    size_t rank = 0;
    Status* s = call(61, (const Shape*)found, &rank);
    if (!s) {
      to->resize(rank);
      s = call(62, (const Shape*)found, to->data(), rank);
    }
    ((void (*const*)(Shape*))api)[99](found);
    return s;
  }
  // Calls body(data, 0), .., body(data, count - 1) on the threads of the session.
  Status* parallel(const Context* c, void (*body)(void*, size_t), size_t count, void* data) const {
    return call(274, c, body, count, size_t(0), data);
  }
};

// An operator as ONNX Runtime is told of it.
struct Operator {
  uint32_t version = VERSION;
  void* (*create)(const Operator*, const Api*, const void*) = nullptr;
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*) = [](const Operator*) -> const char* { return nullptr; };
  int (*input_type)(const Operator*, size_t) = [](const Operator*, size_t) { return FLOAT; };
  size_t (*inputs)(const Operator*);
  int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) { return FLOAT; };
  size_t (*outputs)(const Operator*) = [](const Operator*) -> size_t { return 1; };
  void (*compute)(void*, Context*) = nullptr;
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
  int (*output_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
  int (*memory)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
  void* variadic[4] = {};
  Status* (*create_or_fail)(const Operator*, const Api*, const void*, void**);
  Status* (*compute_or_fail)(void*, Context*);
  void* infer = nullptr;
  int (*first)(const Operator*) = [](const Operator*) { return 1; };
  int (*last)(const Operator*) = [](const Operator*) { return INT32_MAX; };
  void* aliases[4] = {};
  const char* title;  // from here on for this file alone
  int act;
  bool gated;
};

typedef int (*Run)(const void*, const void*, float, const void*, const void*, const void*,
                   const void*, const void*, const void*, void*, int64_t, int64_t, int32_t);
typedef int (*Share)(const void*, const void*, float, const void*, const void*, const void*,
                     const void*, const void*, float*, int64_t, int32_t, int32_t);
// Compiled functions, what they are constant in, and the rows up to which the one for few is used.
struct Kernel {
  int act;
  bool gated;
  int64_t expert_size, d, d_ff, d_out;
  Run run;
  Share share;
  int64_t few;
};
extern const Kernel KERNELS[];
extern const size_t KERNEL_COUNT;
extern const Operator OPERATORS[];
extern const size_t OPERATOR_COUNT;

struct Node {
  Runtime ort;
  const Operator* op;
  int64_t expert_size;
};

struct Call {
  const Kernel* kernel;
  const float *x, *scores, *w_in, *b_in, *w_gate, *b_gate, *w_out, *b_out;
  float tau, *y;
  int64_t rows, experts, chunk;
  int64_t slices;
  std::vector<float> sums;  // of few rows, each slice's
  std::atomic<int> failed{0};

  // Many rows: every thread takes some of them.
  void some_rows(size_t i) {
    const int64_t first = int64_t(i) * chunk, count = std::min(chunk, rows - first);
    failed |= kernel->run(x + first * kernel->d, scores + first * experts, tau, w_in, b_in, w_gate,
                          b_gate, w_out, b_out, y + first * kernel->d_out, count, 0, 1);
  }
  // Few rows: every thread takes some of the experts.
  void some_experts(size_t i) {
    failed |= kernel->share(x, scores, tau, w_in, b_in, w_gate, b_gate, w_out,
                            sums.data() + i * rows * kernel->d_out, rows, i, slices);
  }
};

static Status* compute_checked(const Node& node, Context* c) {
  const Runtime& ort = node.ort;
  const bool gated = node.op->gated;
  const Value* values[9];
  const void* data[9];
  std::vector<int64_t> shapes[9];
  for (size_t i = 0; i < (gated ? 9 : 7); i++) {
    if (Status* s = ort.input(c, i, &values[i])) return s;
    if (Status* s = ort.data(values[i], (void**)&data[i])) return s;
    if (Status* s = ort.shape(values[i], &shapes[i])) return s;
  }
  const std::vector<int64_t>&x = shapes[0], &scores = shapes[1], &w_in = shapes[3],
                            &w_out = shapes[gated ? 7 : 5];
  auto product = [](const std::vector<int64_t>& shape) {
    int64_t n = 1;
    for (int64_t k : shape) n *= k;
    return n;
  };
  // kernels trust their arguments, so these are checked here
  if (x.empty() || scores.size() != x.size() || w_in.size() != 2 || w_out.size() != 2 ||
      product(shapes[2]) != 1)
    return ort.fail("skimp: an input of a block has another rank than it should");
  const int64_t d = x.back(), d_ff = w_in[0], d_out = w_out[1], experts = scores.back();
  bool fits = w_in[1] == d && w_out[0] == d_ff && experts * node.expert_size == d_ff &&
              std::equal(x.begin(), x.end() - 1, scores.begin()) &&
              product(shapes[4]) == d_ff && product(shapes[gated ? 8 : 6]) == d_out;
  if (gated) fits = fits && shapes[5] == w_in && product(shapes[6]) == d_ff;
  if (!fits) return ort.fail("skimp: the inputs of a block do not fit one another");
  Call call{};
  for (size_t i = 0; i < KERNEL_COUNT; i++) {
    const Kernel& k = KERNELS[i];
    if (k.act == node.op->act && k.gated == gated && k.expert_size == node.expert_size &&
        k.d == d && k.d_ff == d_ff && k.d_out == d_out)
      call.kernel = &k;
  }
  if (!call.kernel)
    return ort.fail("skimp: this library was made for another model; make one for this file");
  std::vector<int64_t> shape(x);
  shape.back() = d_out;
  Value* to = nullptr;
  if (Status* s = ort.output(c, shape, &to)) return s;
  if (Status* s = ort.data(to, (void**)&call.y)) return s;
  const float** places[] = {&call.x,      &call.scores, nullptr,     &call.w_in, &call.b_in,
                            &call.w_gate, &call.b_gate, &call.w_out, &call.b_out};
  for (size_t i = 0, j = 0; i < 9; i++) {
    if (!gated && (i == 5 || i == 6)) continue;
    if (places[i]) *places[i] = (const float*)data[j];
    j++;
  }
  call.tau = *(const float*)data[2];
  call.rows = product(x) / (d ? d : 1);
  call.experts = experts;
  if (call.rows == 0) return nullptr;
  for (const float* w : {call.w_in, call.w_gate}) gather(w, d_ff * d * sizeof(float));
  gather(call.w_out, d_ff * d_out * sizeof(float));
  const int64_t threads = omp_get_num_procs();
  Status* s = nullptr;
  if (call.rows > call.kernel->few) {
    call.chunk = std::min(int64_t(128), (call.rows + threads - 1) / threads);
    auto body = [](void* data, size_t i) { ((Call*)data)->some_rows(i); };
    s = ort.parallel(c, body, size_t((call.rows + call.chunk - 1) / call.chunk), &call);
  } else {
    call.slices = std::max<int64_t>(1, std::min(threads, experts / 4));
    call.sums.resize(call.slices * call.rows * d_out);
    auto body = [](void* data, size_t i) { ((Call*)data)->some_experts(i); };
    s = ort.parallel(c, body, size_t(call.slices), &call);
    for (int64_t r = 0; r < call.rows; r++)
      for (int64_t j = 0; j < d_out; j++) {
        float sum = call.b_out[j];
        for (int64_t i = 0; i < call.slices; i++) sum += call.sums[(i * call.rows + r) * d_out + j];
        call.y[r * d_out + j] = sum;
      }
  }
  if (s) return s;
  return call.failed ? ort.fail("skimp: no memory for the scratch of a block") : nullptr;
}

// No exception may cross the frames of ONNX Runtime.
static Status* compute(void* node, Context* c) {
  try {
    return compute_checked(*(const Node*)node, c);
  } catch (const std::exception& error) {
    return ((const Node*)node)->ort.fail(error.what());
  }
}

static Status* create(const Operator* op, const Api* api, const void* info, void** node) {
  int64_t expert_size = 0;
  const Runtime ort{api};
  if (Status* s = ort.call(86, info, "expert_size", &expert_size)) return s;
  *node = new (std::nothrow) Node{ort, op, expert_size};
  return *node ? nullptr : ort.fail("skimp: no memory");
}

static Operator make(const char* title, int act, bool gated) {
  Operator op;
  op.name = [](const Operator* o) { return o->title; };
  op.inputs = [](const Operator* o) -> size_t { return o->gated ? 9 : 7; };
  op.destroy = [](void* node) { delete (Node*)node; };
  op.create_or_fail = create;
  op.compute_or_fail = compute;
  op.title = title, op.act = act, op.gated = gated;
  return op;
}

struct ApiBase {
  const Api* (*api)(uint32_t version);
  const char* (*version)();
};

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(void* options,
                                                                            const ApiBase* base) {
  const Runtime ort{base->api(VERSION)};
  if (!ort.api)
    return Runtime{base->api(1)}.fail("skimp: ONNX Runtime 1.17 or later is needed");
  if (const char* lacking = skimp_unsupported()) return ort.fail(lacking);
  static void* domain = nullptr;  // sessions keep a pointer to it, for as long as they live
  static std::mutex lock;
  std::lock_guard<std::mutex> held(lock);
  if (!domain) {
    if (Status* s = ort.call(26, "skimp", &domain)) return s;
    for (size_t i = 0; i < OPERATOR_COUNT; i++)
      if (Status* s = ort.call(27, domain, (const Operator*)&OPERATORS[i])) return s;
  }
  return ort.call(28, options, domain);
}
