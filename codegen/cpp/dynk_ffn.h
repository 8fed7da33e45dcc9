// A feed-forward network that runs, for each row, the experts whose score is not below
// tau * max(scores); where scores weight the experts, those of a magnitude not below tau. Weights
// are read where PyTorch keeps them.
//
// Many rows: threads take blocks of rows. Within a block every expert has the list of its rows,
// made by counting. Few rows: threads take experts; each weight is read once for all rows that
// need it. Either way experts are run in groups, so that a row of y is read and written once per
// group, and weights that come next but not adjacent are fetched while others are used.
//
// After ReLU a neuron whose activation is exactly zero is left out of the second product, row by
// row: most are, even within the experts that run.
struct Args {
  const stored *x, *scores, *w_in, *b_in, *w_gate, *b_gate, *w_out, *b_out;
  stored* y;
  long rows;
  float tau;
};
constexpr long EXPERTS = D_FF / E;
constexpr bool SCORED = ACT == 7;

// Biases and the activation of one expert's neurons in one row; h holds x . w_in on entry.
static inline void finish(const Args& a, long row, long expert, float* __restrict h,
                          const float* __restrict gate) {
  const float score = SCORED ? widen(a.scores[row * EXPERTS + expert]) : 1.0f;
#pragma omp simd
  for (long n = 0; n < E; n++) {
    long i = expert * E + n;
    float up = h[n] + (B_IN ? widen(a.b_in[i]) : 0.0f);
    if (SCORED) h[n] = score * up;
    else if (GATED) h[n] = act<ACT>(gate[n] + (B_GATE ? widen(a.b_gate[i]) : 0.0f)) * up;
    else h[n] = act<ACT>(up);
  }
}

static inline float threshold(const Args& a, long row) {
  if (SCORED) return a.tau;
  const stored* s = a.scores + row * EXPERTS;
  float most = widen(s[0]);
  bool nan = most != most;
  long e = 1;
  if constexpr (EXPERTS >= LANES) {
    vf top = load(s);
    vu odd = (vu)(top != top);
    for (e = LANES; e + LANES <= EXPERTS; e += LANES) {
      const vf v = load(s + e);
      odd |= (vu)(v != v);
      top = v > top ? v : top;
    }
    for (int i = 0; i < LANES; i++) {
      most = top[i] > most ? top[i] : most;
      nan |= odd[i] != 0;
    }
  }
  for (; e < EXPERTS; e++) {
    float v = widen(s[e]);
    nan |= v != v;
    most = v > most ? v : most;
  }
  if (nan) return NAN;  // nothing is below NaN: every expert runs
  return a.tau * most;
}
static inline bool runs(const Args& a, long row, long e, float t) {
  const float score = widen(a.scores[row * EXPERTS + e]);
  return !((SCORED ? std::fabs(score) : score) < t);
}

// Columns [0, V * LANES) of y += sum over neurons of h * w_out, R rows that share their neurons;
// the sums stay in registers.
template <int R, int V, long STRIDE, class W>
static inline void add_columns(float* const* y, const W* w, const int32_t* live,
                               const float* const* h, long count) {
  vf s[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) s[r][v] = load(y[r] + v * LANES);
  for (long i = 0; i < count; i++) {
    const W* row = w + (long)live[i] * STRIDE;
    if constexpr (R == 1) {
      vf u = splat(h[0][i]);
      for (int v = 0; v < V; v++) s[0][v] += u * load(row + v * LANES);
    } else {
      vf u[V];
      for (int v = 0; v < V; v++) u[v] = load(row + v * LANES);
      for (int r = 0; r < R; r++) {
        vf f = splat(h[r][i]);
        for (int v = 0; v < V; v++) s[r][v] += f * u[v];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *(vf*)(y[r] + v * LANES) = s[r][v];
}
constexpr int WIDE = 12;  // vectors of y in registers; 16 registers less a weight and a factor

// Neurons whose columns of w_out, WIDE vectors of them, fit the first cache together.
constexpr long NEURONS = LANES == 16 ? 32 : 64;
constexpr long EXPERTS_PER_GROUP = E >= NEURONS ? 1 : NEURONS / E;
constexpr long GROUP = EXPERTS_PER_GROUP * E;
constexpr long BLOCK = 128;
constexpr long FEW = 64;
constexpr bool SKIP_ZEROS = ACT == 1 || ACT == 6;

// What one thread needs to run groups of experts for at most `block` rows.
struct Scratch {
  Buffer<float> h, gate, value, packed;
  Buffer<int32_t> live;
  int32_t counts[BLOCK];
  explicit Scratch(long block)
      : h(block * E), gate(GATED ? block * E : 1), value(block * GROUP),
        packed(std::max(E * D, GROUP * WIDE * LANES)), live(block * GROUP) {}
  bool ok() const { return h.p && gate.p && value.p && packed.p && live.p; }
};

// Second product of a group: y[r] += the row's live neurons. PACK copies the columns at hand to
// where their rows are adjacent, which spares the first cache conflicts; few rows do not repay it.
template <bool PACK, int V>
static void columns(const Args& a, Scratch& s, const int32_t* ids, long experts, long count,
                    float* y, long c) {
  constexpr long COLS = V * LANES;
  if constexpr (PACK)
    for (long e = 0; e < experts; e++)
      for (long n = 0; n < E; n++) {
        const stored* from = a.w_out + (ids[e] * E + n) * D_OUT + c;
        float* to = s.packed.p + (e * E + n) * COLS;
        for (int v = 0; v < V; v++) *(vf*)(to + v * LANES) = load(from + v * LANES);
      }
  auto add = [&](auto rows, auto wide, long r, long from) {
    constexpr int R = decltype(rows)::value, N = decltype(wide)::value;
    float* to[R];
    const float* h[R];
    for (int i = 0; i < R; i++) {
      to[i] = y + (r + i) * D_OUT + c + from;
      h[i] = s.value.p + (r + i) * GROUP;
    }
    const int32_t* live = s.live.p + r * GROUP;
    if constexpr (PACK) add_columns<R, N, COLS>(to, s.packed.p + from, live, h, s.counts[r]);
    else add_columns<R, N, D_OUT>(to, a.w_out + c + from, live, h, s.counts[r]);
  };
  using std::integral_constant;
  for (long r = 0; r < count;) {
    bool shared = V % 3 == 0 && !SKIP_ZEROS && r + 4 <= count;
    for (long i = 0; shared && i < 4; i++) shared = s.counts[r + i] == experts * E;
    if (shared) {  // four rows that need all of the group read its weights once
      for (long v = 0; v + 3 <= V; v += 3)
        add(integral_constant<int, 4>(), integral_constant<int, 3>(), r, v * LANES);
      r += 4;
    } else {
      if (s.counts[r]) add(integral_constant<int, 1>(), integral_constant<int, V>(), r, 0);
      r++;
    }
  }
}

// y += what the experts ids[0:experts] add. rows_of(j) are the rows that run the j-th, of
// sizes[j]; `next` runs after these.
template <bool PACK, class Rows>
static void group(const Args& a, Scratch& s, const int32_t* ids, long experts, long count,
                  const operand* x, float* y, Rows rows_of, long next) {
  std::fill(s.counts, s.counts + count, 0);
  for (long j = 0; j < experts; j++) {
    const long e = ids[j], following = j + 1 < experts ? ids[j + 1] : next;
    const uint16_t* rows;
    const long n = rows_of(j, rows);
    const operand* from[BLOCK];
    float *to[BLOCK], *gates[BLOCK];
    for (long i = 0; i < n; i++) {
      from[i] = x + rows[i] * D;
      to[i] = s.h.p + i * E;
      gates[i] = s.gate.p + i * E;
    }
    const long bytes = E * D * sizeof(stored), calls = n / 3;
    auto project = [&](const stored* w, float* const* out, Fetch fetch) {
      if constexpr (PACK && sizeof(stored) < sizeof(operand)) {
        for (long i = 0; i < E * D; i++) s.packed.p[i] = widen(w[i]);
        neurons_of<E>(n, from, (const float*)s.packed.p, out, fetch);
      } else {
        neurons_of<E>(n, from, w, out, fetch);
      }
    };
    // what follows in memory the processor fetches by itself
    const auto ahead = [&](const stored* w) {
      return following == e + 1 ? Fetch() : Fetch(w + following * E * D, bytes, calls);
    };
    if (GATED) {
      project(a.w_gate + e * E * D, gates, ahead(a.w_in));
      project(a.w_in + e * E * D, to, ahead(a.w_gate));
    } else {
      project(a.w_in + e * E * D, to, ahead(a.w_in));
    }
    for (long i = 0; i < n; i++) {
      const long r = rows[i];
      finish(a, r, e, to[i], gates[i]);
      long k = s.counts[r];
      int32_t* live = s.live.p + r * GROUP;
      float* value = s.value.p + r * GROUP;
      for (long m = 0; m < E; m++) {
        live[k] = int32_t(PACK ? j * E + m : e * E + m);
        value[k] = to[i][m];
        k += SKIP_ZEROS ? to[i][m] != 0 : 1;
      }
      s.counts[r] = int32_t(k);
    }
  }
  long c = 0;
  for (; c + WIDE * LANES <= D_OUT; c += WIDE * LANES)
    columns<PACK, WIDE>(a, s, ids, experts, count, y, c);
  for (; c + 4 * LANES <= D_OUT; c += 4 * LANES)
    columns<PACK, 4>(a, s, ids, experts, count, y, c);
  for (; c + LANES <= D_OUT; c += LANES) columns<PACK, 1>(a, s, ids, experts, count, y, c);
  for (; c < D_OUT; c++)
    for (long r = 0; r < count; r++)
      for (long i = 0; i < s.counts[r]; i++) {
        const long m = s.live.p[r * GROUP + i], neuron = PACK ? ids[m / E] * E + m % E : m;
        y[r * D_OUT + c] += s.value.p[r * GROUP + i] * widen(a.w_out[neuron * D_OUT + c]);
      }
}

constexpr bool WIDEN = sizeof(stored) < sizeof(operand);

// Rows of x in the type of products: where they are, or in `wide`.
static const operand* rows_as_operands(const stored* x, long rows, operand* wide) {
  if constexpr (WIDEN) {
    for (long i = 0; i < rows * D; i++) wide[i] = widen(x[i]);
    return wide;
  } else {
    return (const operand*)x;
  }
}

static int many_rows(const Args& a, int threads) {
  const long turns = (a.rows + threads * BLOCK - 1) / (threads * BLOCK);
  const long blocks = std::min(a.rows, turns * threads), block = (a.rows + blocks - 1) / blocks;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Scratch s(block);
    Buffer<float> y(block * D_OUT);
    Buffer<operand> wide(WIDEN ? block * D : 1);
    Buffer<uint16_t> lists(EXPERTS * block + 1);
    Buffer<int32_t> sizes(EXPERTS), active(EXPERTS);
    if (!s.ok() || !y.p || !wide.p || !lists.p || !sizes.p || !active.p) {
      failed = 1;
    } else {
#pragma omp for schedule(dynamic, 1)
      for (long b = 0; b < blocks; b++) {
        const long first = b * block, count = std::min(block, a.rows - first);
        if (count <= 0) continue;
        Args here = a;
        here.scores += first * EXPERTS;
        std::fill(sizes.p, sizes.p + EXPERTS, 0);
        for (long r = 0; r < count; r++) {
          const float t = threshold(here, r);
          for (long e = 0; e < EXPERTS; e++) {
            lists.p[e * block + sizes.p[e]] = uint16_t(r);
            sizes.p[e] += runs(here, r, e, t);
          }
        }
        long some = 0;
        for (long e = 0; e < EXPERTS; e++) {
          active.p[some] = int32_t(e);
          some += sizes.p[e] > 0;
        }
        const operand* x = rows_as_operands(a.x + first * D, count, wide.p);
        std::memset(y.p, 0, count * D_OUT * sizeof(float));
        for (long g = 0; g < some; g += EXPERTS_PER_GROUP) {
          const long n = std::min(EXPERTS_PER_GROUP, some - g);
          const auto rows_of = [&](long j, const uint16_t*& rows) -> long {
            rows = lists.p + active.p[g + j] * block;
            return sizes.p[active.p[g + j]];
          };
          const long next = g + n < some ? active.p[g + n] : 0;
          group<true>(here, s, active.p + g, n, count, x, y.p, rows_of, next);
        }
        for (long r = 0; r < count; r++)
          for (long c = 0; c < D_OUT; c++)
            narrow(y.p[r * D_OUT + c] + (B_OUT ? widen(a.b_out[c]) : 0.0f),
                   a.y + (first + r) * D_OUT + c);
      }
    }
  }
  return failed;
}

// Bit r of rows[e]: row r runs expert e.
static void choose(const Args& a, uint64_t* rows) {
  float t[FEW];
  for (long r = 0; r < a.rows; r++) t[r] = threshold(a, r);
  long e = 0;
  for (; e + LANES <= EXPERTS; e += LANES) {
    vu word[FEW / 32] = {};
    for (long r = 0; r < a.rows; r++) {
      vf v = load(a.scores + r * EXPERTS + e);
      if (SCORED) v = (vf)((vu)v & 0x7fffffffu);
      word[r / 32] |= ~(vu)(v < splat(t[r])) & (1u << r % 32);
    }
    for (int i = 0; i < LANES; i++) rows[e + i] = word[0][i] | (uint64_t)word[1][i] << 32;
  }
  if constexpr (EXPERTS % LANES)
    for (; e < EXPERTS; e++) {
      rows[e] = 0;
      for (long r = 0; r < a.rows; r++) rows[e] |= (uint64_t)runs(a, r, e, t[r]) << r;
    }
}

// What one of `all` threads does for few rows: sums [rows, D_OUT] over its share of the experts that
// run. False if memory ran out.
static bool share(const Args& a, const operand* x, int me, int all, float* sums) {
  std::memset(sums, 0, a.rows * D_OUT * sizeof(float));
  Scratch s(a.rows);
  Buffer<uint64_t> chosen(EXPERTS);
  Buffer<int32_t> active(EXPERTS);
  if (!s.ok() || !chosen.p || !active.p) return false;
  choose(a, chosen.p);  // every thread for itself: it takes less than a meeting
  long some = 0;
  for (long e = 0; e < EXPERTS; e++) {
    active.p[some] = int32_t(e);
    some += chosen.p[e] != 0;
  }
  const long end = some * (me + 1) / all;
  for (long g = some * me / all; g < end; g += EXPERTS_PER_GROUP) {
    const long n = std::min(EXPERTS_PER_GROUP, end - g);
    uint16_t list[FEW];
    const auto rows_of = [&](long j, const uint16_t*& rows) -> long {
      long k = 0;
      for (uint64_t left = chosen.p[active.p[g + j]]; left; left &= left - 1)
        list[k++] = uint16_t(__builtin_ctzll(left));
      rows = list;
      return k;
    };
    const long next = g + n < end ? active.p[g + n] : active.p[g];
    group<false>(a, s, active.p + g, n, a.rows, x, sums, rows_of, next);
  }
  return true;
}

// Columns [first, last) of y from the sums of all threads, which lie one after the other.
static void total(const Args& a, const float* sums, int all, long first, long last) {
  for (long r = 0; r < a.rows; r++)
    for (long c = first; c < last; c++) {
      float sum = B_OUT ? widen(a.b_out[c]) : 0.0f;
      for (int k = 0; k < all; k++) sum += sums[(k * a.rows + r) * D_OUT + c];
      narrow(sum, a.y + r * D_OUT + c);
    }
}

static int few_rows(const Args& a, int threads) {
  Buffer<float> sums(a.rows * D_OUT * threads);
  Buffer<operand> wide(WIDEN ? a.rows * D : 1);
  if (!sums.p || !wide.p) return 1;
  const operand* x = rows_as_operands(a.x, a.rows, wide.p);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    failed = !share(a, x, me, all, sums.p + me * a.rows * D_OUT);
#pragma omp barrier
    total(a, sums.p, all, D_OUT * me / all, D_OUT * (me + 1) / all);
  }
  return failed;
}

// Up to `few` rows, and never more than FEW, take the form for few rows. Returns 0, or 1 when
// memory ran out.
extern "C" int dynk_ffn(const void* x, const void* scores, float tau, const void* w_in,
                        const void* b_in, const void* w_gate, const void* b_gate,
                        const void* w_out, const void* b_out, void* y, int64_t rows, int64_t few,
                        int32_t threads) {
  const Args a{(const stored*)x,      (const stored*)scores, (const stored*)w_in,
               (const stored*)b_in,   (const stored*)w_gate, (const stored*)b_gate,
               (const stored*)w_out,  (const stored*)b_out,  (stored*)y,
               (long)rows,            tau};
  if (rows == 0) return 0;
  return rows <= std::min((long)few, FEW) ? few_rows(a, threads) : many_rows(a, threads);
}

// For callers with threads of their own, what one of `all` adds to FEW rows or fewer: sums
// [rows, D_OUT] in float32, without b_out. Returns likewise.
[[maybe_unused]] static int dynk_ffn_share(const void* x, const void* scores, float tau,
                                           const void* w_in, const void* b_in, const void* w_gate,
                                           const void* b_gate, const void* w_out, float* sums,
                                           int64_t rows, int32_t me, int32_t all) {
  const Args a{(const stored*)x,      (const stored*)scores, (const stored*)w_in,
               (const stored*)b_in,   (const stored*)w_gate, (const stored*)b_gate,
               (const stored*)w_out,  nullptr,               nullptr,
               (long)rows,            tau};
  Buffer<operand> wide(WIDEN ? rows * D : 1);
  return !wide.p || !share(a, rows_as_operands(a.x, rows, wide.p), me, all, sums);
}
