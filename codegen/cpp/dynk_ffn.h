// A feed-forward network that runs, for each row, the experts whose score is not below
// tau * max(scores). Weights are read where PyTorch keeps them; nothing is packed.
//
// Many rows: threads take blocks of rows. Within a block every expert has the list of its rows,
// made by counting. Neurons are taken in groups whose slice of w_out stays in the first cache.
// Few rows: threads take experts; each weight is read once for all rows that need it.
//
// In the second product a neuron whose activation is exactly zero is left out, row by row: after
// ReLU most are, even within the experts that run.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <omp.h>

typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#ifdef STORAGE_BF16
typedef uint16_t stored;
#else
typedef float stored;
#endif

static inline float widen(float v) { return v; }
static inline float widen(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
static inline void narrow(float v, float* to) { *to = v; }
static inline void narrow(float v, uint16_t* to) {  // round to nearest, ties to even; keep NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  *to = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vf load(const float* p) { return *(const vf*)p; }
static inline vf load(const uint16_t* p) {
  return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16);
}
static inline vf splat(float v) { return v - vf{}; }
static inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// Branch-free, so that the compiler turns loops over them into vectors; NaN stays NaN.
static inline float exp_(float x) {
  float c = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = std::nearbyint(c * 1.44269504f);
  float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n == n ? n : 0.0f) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  float y = p * scale;
  y = x > 88.0f ? INFINITY : y;
  return x < -87.0f ? 0.0f : y;
}
static inline float erf_(float v) {  // odd rational fit on [-4, 4], error below 1e-6
  float x = v < -4.0f ? -4.0f : (v > 4.0f ? 4.0f : v), s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}
static inline float act(float v) {
  if (ACT == 1) return v < 0 ? 0.0f : v;  // "not below", so that NaN passes
  if (ACT == 2) return 0.5f * v * (1.0f + erf_(v * 0.70710678f));
  if (ACT == 3) {
    float u = 0.79788456f * (v + 0.044715f * v * v * v);
    return v - v / (1.0f + exp_(2.0f * u));
  }
  if (ACT == 4) return v / (1.0f + exp_(-v));
  return v;
}

// out[r * stride + n] = x[r] . w[n], R rows by N neurons; the sums live in registers.
template <int R, int N, class W>
static inline __attribute__((always_inline)) void dots(const float* const* x, const W* w,
                                                       float* const* out) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) a[r][n] = vf{};
  for (long k = 0; k + LANES <= D; k += LANES) {
    vf v[R];
    for (int r = 0; r < R; r++) v[r] = load(x[r] + k);
    for (int n = 0; n < N; n++) {
      vf u = load(w + n * D + k);
      for (int r = 0; r < R; r++) a[r][n] += v[r] * u;
    }
  }
  constexpr long tail = D / LANES * LANES;
  for (int r = 0; r < R; r++) {
    int n = 0;
#if defined(__AVX2__)
    if (LANES == 8)
      for (; n + 4 <= N; n += 4) {  // four sums at once
        __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a[r][n], (__m256)a[r][n + 1]),
                                  _mm256_hadd_ps((__m256)a[r][n + 2], (__m256)a[r][n + 3]));
        _mm_storeu_ps(out[r] + n,
                      _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
      }
#endif
    for (; n < N; n++) out[r][n] = sum(a[r][n]);
    if (tail < D)
      for (n = 0; n < N; n++)
        for (long k = tail; k < D; k++) out[r][n] += x[r][k] * widen(w[n * D + k]);
  }
}

// One expert's neurons for R rows.
template <int R, class W>
static inline void neurons(const float* const* x, const W* w, float* const* out) {
  constexpr int N = R == 1 ? (E % 8 == 0 ? 8 : E % 6 == 0 ? 6 : 4) : R == 2 ? 6 : R == 3 ? 4 : 3;
  float* to[R];
  long n = 0;
  for (; n + N <= E; n += N) {
    for (int r = 0; r < R; r++) to[r] = out[r] + n;
    dots<R, N>(x, w + n * D, to);
  }
  if constexpr (N > 4 && E % N >= 4)
    for (; n + 4 <= E; n += 4) {
      for (int r = 0; r < R; r++) to[r] = out[r] + n;
      dots<R, 4>(x, w + n * D, to);
    }
  if constexpr (N > 2 && E % N >= 2)
    for (; n + 2 <= E; n += 2) {
      for (int r = 0; r < R; r++) to[r] = out[r] + n;
      dots<R, 2>(x, w + n * D, to);
    }
  for (; n < E; n++) {
    for (int r = 0; r < R; r++) to[r] = out[r] + n;
    dots<R, 1>(x, w + n * D, to);
  }
}

template <class W>
static inline void neurons_of(long count, const float* const* x, const W* w, float* const* out) {
  constexpr int R = E % 4 == 0 ? 3 : 4;
  long r = 0;
  for (; r + R <= count; r += R) neurons<R>(x + r, w, out + r);
  if (count - r >= 3) neurons<3>(x + r, w, out + r), r += 3;
  if (count - r >= 2) neurons<2>(x + r, w, out + r), r += 2;
  if (count - r >= 1) neurons<1>(x + r, w, out + r);
}

struct Args {
  const stored *x, *scores, *w_in, *b_in, *w_gate, *b_gate, *w_out, *b_out;
  stored* y;
  long rows;
  float tau;
};
constexpr long EXPERTS = D_FF / E;

// Biases and the activation of one expert's neurons in one row; h holds x . w_in on entry.
static inline void finish(const Args& a, long expert, float* h, const float* gate) {
  for (long n = 0; n < E; n++) {
    long i = expert * E + n;
    float up = h[n] + (B_IN ? widen(a.b_in[i]) : 0.0f);
    if (GATED) h[n] = act(gate[n] + (B_GATE ? widen(a.b_gate[i]) : 0.0f)) * up;
    else h[n] = act(up);
  }
}

static inline float threshold(const Args& a, long row) {
  const stored* s = a.scores + row * EXPERTS;
  float most = widen(s[0]);
  bool nan = most != most;
  for (long e = 1; e < EXPERTS; e++) {
    float v = widen(s[e]);
    nan |= v != v;
    most = v > most ? v : most;
  }
  if (nan) return NAN;  // nothing is below NaN: every expert runs
  stored t;
  narrow(a.tau * most, &t);  // the product has the dtype of the scores
  return widen(t);
}
static inline bool runs(const Args& a, long row, long e, float t) {
  return !(widen(a.scores[row * EXPERTS + e]) < t);
}

// y[0:D_OUT] += sum over a row's live neurons h * w_out; V vectors of y stay in registers.
template <int V, class W>
static inline void add_columns(float* y, const W* w, const int32_t* live, const float* h,
                               long count) {
  vf s[V];
  for (int v = 0; v < V; v++) s[v] = load(y + v * LANES);
  for (long i = 0; i < count; i++) {
    const W* row = w + (long)live[i] * D_OUT;
    vf u = splat(h[i]);
    for (int v = 0; v < V; v++) s[v] += u * load(row + v * LANES);
  }
  for (int v = 0; v < V; v++) *(vf*)(y + v * LANES) = s[v];
}
template <class W>
static inline void add_tail(float* y, const W* w, const int32_t* live, const float* h, long count,
                            long c) {
  for (; c + LANES <= D_OUT; c += LANES) add_columns<1>(y + c, w + c, live, h, count);
  for (; c < D_OUT; c++)
    for (long i = 0; i < count; i++) y[c] += h[i] * widen(w[(long)live[i] * D_OUT + c]);
}
constexpr int WIDE = 12;  // vectors of y in registers; 16 registers less a weight and a factor

// Which of n activations are not zero: their places and values.
static inline long compress(const float* h, long n, int32_t* live, float* value) {
  long count = 0;
  for (long i = 0; i < n; i++) {
    live[count] = int32_t(i);
    value[count] = h[i];
    count += h[i] != 0;
  }
  return count;
}

static void store_rows(const Args& a, const float* y, long first, long count) {
  for (long r = 0; r < count; r++)
    for (long c = 0; c < D_OUT; c++)
      narrow(y[r * D_OUT + c] + (B_OUT ? widen(a.b_out[c]) : 0.0f),
             a.y + (first + r) * D_OUT + c);
}

template <class T>
struct Buffer {  // aligned scratch; a failed allocation is reported, not thrown through C
  T* p;
  explicit Buffer(long n) : p((T*)std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)) {}
  ~Buffer() { std::free(p); }
  Buffer(const Buffer&) = delete;
};

constexpr long EXPERTS_PER_GROUP = E >= 64 ? 1 : 64 / E;
constexpr long GROUP = EXPERTS_PER_GROUP * E;
constexpr long BLOCK = 128;

static int many_rows(const Args& a, int threads) {
  const long block = std::min(BLOCK, std::max(1L, (a.rows + threads - 1) / threads));
  const long blocks = (a.rows + block - 1) / block;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Buffer<float> y(block * D_OUT), h(block * GROUP), gate(block * GROUP), value(block * GROUP);
    Buffer<int32_t> live(block * GROUP);
    Buffer<uint16_t> lists(EXPERTS * block);
    Buffer<int32_t> sizes(EXPERTS);
    Buffer<float> wide(sizeof(stored) == 2 ? block * D + GROUP * (D > D_OUT ? D : D_OUT) : 1);
    if (!y.p || !h.p || !gate.p || !value.p || !live.p || !lists.p || !sizes.p || !wide.p) {
      failed = 1;
    } else {
#pragma omp for schedule(dynamic, 1)
      for (long b = 0; b < blocks; b++) {
        const long first = b * block, count = std::min(block, a.rows - first);
        std::fill(sizes.p, sizes.p + EXPERTS, 0);
        for (long r = 0; r < count; r++) {
          const float t = threshold(a, first + r);
          for (long e = 0; e < EXPERTS; e++) {
            lists.p[e * block + sizes.p[e]] = uint16_t(r);
            sizes.p[e] += runs(a, first + r, e, t);
          }
        }
        const float* x;
        float* spare = wide.p;
        if constexpr (sizeof(stored) == 2) {
          for (long i = 0; i < count * D; i++) wide.p[i] = widen(a.x[first * D + i]);
          x = wide.p;
          spare += block * D;
        } else {
          x = (const float*)(a.x + first * D);
        }
        std::memset(y.p, 0, count * D_OUT * sizeof(float));
        for (long g = 0; g < EXPERTS; g += EXPERTS_PER_GROUP) {
          const long end = std::min(EXPERTS, g + EXPERTS_PER_GROUP);
          std::memset(h.p, 0, count * GROUP * sizeof(float));
          for (long e = g; e < end; e++) {
            const long n = sizes.p[e];
            if (n == 0) continue;
            const float* from[BLOCK];
            float *to[BLOCK], *gates[BLOCK];
            for (long i = 0; i < n; i++) {
              const long r = lists.p[e * block + i];
              from[i] = x + r * D;
              to[i] = h.p + r * GROUP + (e - g) * E;
              gates[i] = gate.p + r * GROUP + (e - g) * E;
            }
            if constexpr (sizeof(stored) == 2) {
              for (long i = 0; i < E * D; i++) spare[i] = widen(a.w_in[e * E * D + i]);
              neurons_of(n, from, (const float*)spare, to);
              if (GATED) {
                for (long i = 0; i < E * D; i++) spare[i] = widen(a.w_gate[e * E * D + i]);
                neurons_of(n, from, (const float*)spare, gates);
              }
            } else {
              neurons_of(n, from, a.w_in + e * E * D, to);
              if (GATED) neurons_of(n, from, a.w_gate + e * E * D, gates);
            }
            for (long i = 0; i < n; i++) finish(a, e, to[i], gates[i]);
          }
          const long width = (end - g) * E;
          int32_t counts[BLOCK];
          for (long r = 0; r < count; r++)
            counts[r] = int32_t(
                compress(h.p + r * GROUP, width, live.p + r * GROUP, value.p + r * GROUP));
          auto second = [&](auto* w) {
            long c = 0;
            for (; c + WIDE * LANES <= D_OUT; c += WIDE * LANES)
              for (long r = 0; r < count; r++)
                add_columns<WIDE>(y.p + r * D_OUT + c, w + c, live.p + r * GROUP,
                                  value.p + r * GROUP, counts[r]);
            for (; c + 4 * LANES <= D_OUT; c += 4 * LANES)
              for (long r = 0; r < count; r++)
                add_columns<4>(y.p + r * D_OUT + c, w + c, live.p + r * GROUP,
                               value.p + r * GROUP, counts[r]);
            if (c < D_OUT)
              for (long r = 0; r < count; r++)
                add_tail(y.p + r * D_OUT, w, live.p + r * GROUP, value.p + r * GROUP, counts[r],
                         c);
          };
          if constexpr (sizeof(stored) == 2) {
            for (long i = 0; i < width * D_OUT; i++) spare[i] = widen(a.w_out[g * E * D_OUT + i]);
            second((const float*)spare);
          } else {
            second(a.w_out + g * E * D_OUT);
          }
        }
        store_rows(a, y.p, first, count);
      }
    }
  }
  return failed;
}

constexpr long FEW = 16;

static int few_rows(const Args& a, int threads) {
  const long size = a.rows * D_OUT;
  Buffer<float> y(size * threads), x(a.rows * D);
  Buffer<int32_t> active(EXPERTS);
  if (!y.p || !x.p || !active.p) return 1;
  float t[FEW];
  for (long r = 0; r < a.rows; r++) t[r] = threshold(a, r);
  long count = 0;
  for (long e = 0; e < EXPERTS; e++) {
    bool any = false;
    for (long r = 0; r < a.rows; r++) any |= runs(a, r, e, t[r]);
    active.p[count] = int32_t(e);
    count += any;
  }
  for (long i = 0; i < a.rows * D; i++) x.p[i] = widen(a.x[i]);
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    float* mine = y.p + me * size;
    std::memset(mine, 0, size * sizeof(float));
    float h[FEW][E], gate[FEW][E], value[E];
    int32_t live[E];
    for (long i = count * me / all; i < count * (me + 1) / all; i++) {
      const long e = active.p[i];
      const float* from[FEW];
      float *to[FEW], *gates[FEW];
      long row[FEW], n = 0;
      for (long r = 0; r < a.rows; r++)
        if (runs(a, r, e, t[r])) {
          from[n] = x.p + r * D;
          to[n] = h[n];
          gates[n] = gate[n];
          row[n++] = r;
        }
      neurons_of(n, from, a.w_in + e * E * D, to);
      if (GATED) neurons_of(n, from, a.w_gate + e * E * D, gates);
      const stored* w = a.w_out + e * E * D_OUT;
      for (long j = 0; j < n; j++) {
        finish(a, e, h[j], gate[j]);
        const long lives = compress(h[j], E, live, value);
        if (lives == 0) continue;
        float* to_y = mine + row[j] * D_OUT;
        long c = 0;
        for (; c + 4 * LANES <= D_OUT; c += 4 * LANES)
          add_columns<4>(to_y + c, w + c, live, value, lives);
        if (c < D_OUT) add_tail(to_y, w, live, value, lives, c);
      }
    }
#pragma omp barrier
    for (long i = size * me / all; i < size * (me + 1) / all; i++) {
      float total = B_OUT ? widen(a.b_out[i % D_OUT]) : 0.0f;
      for (int k = 0; k < all; k++) total += y.p[k * size + i];
      narrow(total, a.y + i);
    }
  }
  return 0;
}

// Returns 0, or 1 when memory ran out.
extern "C" int dynk_ffn(const void* x, const void* scores, float tau, const void* w_in,
                        const void* b_in, const void* w_gate, const void* b_gate,
                        const void* w_out, const void* b_out, void* y, int64_t rows,
                        int32_t threads) {
  const Args a{(const stored*)x,      (const stored*)scores, (const stored*)w_in,
               (const stored*)b_in,   (const stored*)w_gate, (const stored*)b_gate,
               (const stored*)w_out,  (const stored*)b_out,  (stored*)y,
               (long)rows,            tau};
  if (rows == 0) return 0;
  return rows <= FEW ? few_rows(a, threads) : many_rows(a, threads);
}
