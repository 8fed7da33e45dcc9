// Products of a few rows with packed weights, and the barrier between the phases of a step.
//
// Weights are packed in blocks of LANES neurons: a block holds, for each k (bfloat16: each pair of
// k), one value of every neuron, so that a lane is a neuron and nothing is left to add up across
// lanes. Every sum runs over k from first to last whatever the number of rows, threads or blocks at
// hand, so a row's result never depends, to the bit, on what is computed beside it.
#include <atomic>
#include <functional>
#include <vector>
#if defined(__x86_64__)
#include <sched.h>
#endif

constexpr long PAIR = sizeof(stored) == 2 ? 2 : 1;
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;  // by TILE_BLOCKS sums, which fit the registers
constexpr int TILE_BLOCKS = 3;

constexpr long up_to(long n, long m) { return (n + m - 1) / m * m; }
constexpr long block_size(long k) { return up_to(k, PAIR) * LANES; }
constexpr long blocks_of(long n) { return (n + LANES - 1) / LANES; }
constexpr long WIDTH = up_to(D, LANES), GATES = up_to(D_FF, LANES);
// Of a row of operands of products over k elements.
constexpr long operands(long k) { return up_to(k, LANES) + LANES; }

static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Part of the sum that is computed: k in [from, to).
struct Segment {
  int32_t from, to;
};

constexpr long AHEAD = 2048 / sizeof(stored) / (LANES * PAIR);  // steps of k

// What is fetched at step k while w[v] is read at it: near[v] up to step `turn`, then later[v].
struct Ahead {
  const stored *near[TILE_BLOCKS], *later[TILE_BLOCKS];
  long turn;
};

// out[r][v] = x[r] . w[v] over the segments, R rows by V blocks.
template <int R, int V>
static __attribute__((noinline)) void tile(const operand* x, long ld, const stored* const* w,
                                           const Ahead& ahead, const Segment* segments, long count,
                                           float* out) {
  vf a[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) a[r][v] = vf{};
  for (long s = 0; s < count; s++) {
    const long from = segments[s].from / PAIR, to = (segments[s].to + PAIR - 1) / PAIR;
    const auto step = [&](long k, const stored* const* fetched) __attribute__((always_inline)) {
      for (int v = 0; v < V; v++) __builtin_prefetch(fetched[v] + k * LANES * PAIR, 0, 2);
#if !defined(STORAGE_BF16)
      vf u[V];
      for (int v = 0; v < V; v++) u[v] = load(w[v] + k * LANES);
      for (int r = 0; r < R; r++) {
        const vf f = splat(x[r * ld + k]);
        for (int v = 0; v < V; v++) a[r][v] = fma(f, u[v], a[r][v]);
      }
#elif defined(__AVX512BF16__)
      __m512bh u[V];
      for (int v = 0; v < V; v++) u[v] = (__m512bh)_mm512_loadu_si512(w[v] + k * LANES * 2);
      for (int r = 0; r < R; r++) {
        int32_t pair;
        std::memcpy(&pair, x + r * ld + 2 * k, 4);
        const __m512bh f = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; v++)
          a[r][v] = (vf)_mm512_dpbf16_ps((__m512)a[r][v], f, u[v]);
      }
#else
      vf low[V], high[V];
      for (int v = 0; v < V; v++) {
        const vu bits = *(const vu*)(w[v] + k * LANES * 2);
        low[v] = (vf)(bits << 16);
        high[v] = (vf)(bits & 0xffff0000u);
      }
      for (int r = 0; r < R; r++) {
        const vf f = splat(x[r * ld + 2 * k]), g = splat(x[r * ld + 2 * k + 1]);
        for (int v = 0; v < V; v++) a[r][v] = fma(g, high[v], fma(f, low[v], a[r][v]));
      }
#endif
    };
    long k = from;
    for (; k < std::min(to, ahead.turn); k++) step(k, ahead.near);
    for (; k < to; k++) step(k, ahead.later);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *(vf*)(out + (r * V + v) * LANES) = a[r][v];
}

// Call `body` with the constant that equals n, 1 <= n <= MOST.
template <int MOST, class Body>
static inline void constant(long n, Body body) {
  if constexpr (MOST > 1) {
    if (n < MOST) return constant<MOST - 1>(n, body);
  }
  body(std::integral_constant<int, MOST>());
}

static inline void tile_of(long rows, long blocks, const operand* x, long ld,
                           const stored* const* w, const Ahead& ahead,
                           const Segment* segments, long count, float* out) {
  constant<TILE_BLOCKS>(blocks, [&](auto v) {
    constant<TILE_ROWS>(rows, [&](auto r) {
      tile<decltype(r)::value, decltype(v)::value>(x, ld, w, ahead, segments, count, out);
    });
  });
}

// Rows of products over k elements: x has `rows` rows `ld` apart. `take(r, v, y)` is given the LANES
// results of row r and the v-th block of `w`. Rows go in tiles of about equal size; the first tile
// reads the weights from memory, and the last fetches those that come next.
template <class Take>
static inline void products(const operand* x, long ld, long rows, const stored* const* w,
                            const stored* const* next, long blocks, long k, const Segment* segments,
                            long count, Take take) {
  const long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, steps = up_to(k, PAIR) / PAIR;
  // one tile both reads its blocks and, towards their end, fetches the beginning of the next ones
  Ahead reading{{}, {}, std::max(0L, steps - AHEAD)}, rest{{}, {}, steps};
  for (long v = 0; v < blocks; v++) {
    reading.near[v] = w[v] + AHEAD * LANES * PAIR;
    reading.later[v] = next[v] - reading.turn * LANES * PAIR;
    rest.near[v] = next[v];
  }
  alignas(64) float y[TILE_ROWS * TILE_BLOCKS * LANES];
  for (long t = 0; t < tiles; t++) {
    const long first = rows * t / tiles, n = rows * (t + 1) / tiles - first;
    tile_of(n, blocks, x + first * ld, ld, w, tiles > 1 && t == tiles - 1 ? rest : reading,
            segments, count, y);
    for (long r = 0; r < n; r++)
      for (long v = 0; v < blocks; v++) take(first + r, v, y + (r * blocks + v) * LANES);
  }
}

// Threads meet here some ten times per layer. They spin for a while and then give the core away, so
// that a step goes on where there are fewer cores than threads.
class Barrier {
  std::atomic<int> waiting{0}, turn{0};

 public:
  void meet(int all) {
    if (all == 1) return;
    const int now = turn.load(std::memory_order_relaxed);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == all - 1) {
      waiting.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; turn.load(std::memory_order_acquire) == now; i++) {
#if defined(__x86_64__)
      if (i < 4096) __builtin_ia32_pause();
      else sched_yield();
#endif
    }
  }
};
