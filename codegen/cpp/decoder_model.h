// A decoder and a step of it, as they are handed over from Python (decoder.py holds the same
// structures), and the scratch of steps.
struct Router {  // Linear -> ReLU -> Linear -> abs, or tanh and sigmoid; see skimp.ir.block
  const stored *down, *up;
  int64_t width, experts, expert_size, sigmoid, top;
  const float* tau;
};
struct Layer {
  const float* norm_in;
  const stored* qkv;
  const float *qkv_bias, *q_norm, *k_norm;  // biases and norms may be null
  const stored* out;
  const float* norm_mid;
  const stored *gate_up, *down;  // blocks of gates and of the other inputs take turns
  Router router;                 // down is null where there is none
  // Where the gate chooses neurons, the least gate that is not left out, else null. Then gate_up has
  // gates alone, and down of every neuron both its other weights, each padded to ROW.
  const float* tau;
};
struct Model {
  const Layer* layers;
  int64_t count;
  const stored* embedding;  // [vocabulary][D], as PyTorch keeps it
  const stored* mix;        // packed [D][2 D], of embedding and feature; or null
  const float* norm;
  const stored* head;  // packed [words][D]
  int64_t words;
  float eps, scale;
};
struct Step {
  int64_t rows, sequences;
  const int64_t* tokens;
  const int64_t* bounds;    // [sequences + 1]: rows of each
  const int32_t* parents;   // of nodes, among those of the same sequence; -1: the last committed
  const int64_t* nodes;     // [sequences + 1]: nodes of each, of which its rows are the last
  const int64_t* slots;       // of the cache
  const int64_t* committed;   // positions
  const float *cosine, *sine; // [positions][ROPE]
  const float* features;      // [rows][D], where the model mixes them in
  stored *keys, *values;      // [layers][slots] of what Cache describes
  int64_t all_slots, capacity;
  const int64_t* wanted;  // rows whose logits are wanted
  int64_t wanted_rows;
  float *logits, *hidden;  // [wanted][words]; [rows][D], after the last norm
  int64_t sparse, threads;
};

// Scratch of a step that lives on, so that no page of it is given back between steps.
struct Arena {
  char* p = nullptr;
  size_t size = 0, used = 0;
  ~Arena() { std::free(p); }
  void reset() { used = 0; }
  template <class T>
  T* take(long n) {
    T* at = (T*)(p + used);
    used += up_to(n * sizeof(T), 64) + 64;
    return at;
  }
};
static thread_local Arena arena;
