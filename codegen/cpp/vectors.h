// Vectors of LANES floats, two storage types, and the activations.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
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

// Products of two bfloat16 numbers where the CPU adds them up in float32 itself; elsewhere rows are
// widened first.
#if defined(STORAGE_BF16) && defined(__AVX512BF16__)
typedef stored operand;
#else
typedef float operand;
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

#if defined(__AVX2__)
static inline __m256 fold(vf v) {  // eight lanes with the same sum
  __m256 half[sizeof(vf) / 32];
  std::memcpy(half, &v, sizeof v);
  return LANES == 8 ? half[0] : half[0] + half[sizeof(vf) / 32 - 1];
}
#endif

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
template <int ACT>
static inline float act(float v) {
  if (ACT == 1) return v < 0 ? 0.0f : v;  // "not below", so that NaN passes
  if (ACT == 2) return 0.5f * v * (1.0f + erf_(v * 0.70710678f));
  if (ACT == 3) {
    float u = 0.79788456f * (v + 0.044715f * v * v * v);
    return v - v / (1.0f + exp_(2.0f * u));
  }
  if (ACT == 4) return v / (1.0f + exp_(-v));
  if (ACT == 5) return v / (1.0f + exp_(-1.702f * v));
  if (ACT == 6) return v < 0 ? 0.0f : v * v;
  return v;
}

template <class T>
struct Buffer {  // aligned scratch; a failed allocation is reported, not thrown through C
  T* p;
  explicit Buffer(long n) : p((T*)std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)) {}
  ~Buffer() { std::free(p); }
  Buffer(const Buffer&) = delete;
};

// Weights that are wanted next, fetched a few lines at a time while others are used.
struct Fetch {
  const char *p = nullptr, *end = nullptr;
  long step = 0;
  Fetch() = default;
  Fetch(const void* from, long bytes, long calls)
      : p((const char*)from), end(p + bytes), step((bytes / 64 + calls) / std::max(1L, calls)) {}
  void some() {
    for (long i = 0; i < step && p < end; i++, p += 64) __builtin_prefetch(p, 0, 2);
  }
};

template <int R, int N>
static inline __attribute__((always_inline)) void sums(const vf (*a)[N], float* const* out) {
  for (int r = 0; r < R; r++) {
    int n = 0;
#if defined(__AVX2__)
    for (; n + 4 <= N; n += 4) {  // four sums at once
      __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(fold(a[r][n]), fold(a[r][n + 1])),
                                _mm256_hadd_ps(fold(a[r][n + 2]), fold(a[r][n + 3])));
      _mm_storeu_ps(out[r] + n,
                    _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }
#endif
    for (; n < N; n++) out[r][n] = sum(a[r][n]);
  }
}

// out[r][n] = x[r] . w[n], R rows by N neurons; the sums live in registers.
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
  sums<R, N>(a, out);
  constexpr long tail = D / LANES * LANES;
  if (tail < D)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++)
        for (long k = tail; k < D; k++) out[r][n] += x[r][k] * widen(w[n * D + k]);
}

#if defined(STORAGE_BF16) && defined(__AVX512BF16__)
template <int R, int N>
static inline __attribute__((always_inline)) void dots(const stored* const* x, const stored* w,
                                                       float* const* out) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) a[r][n] = vf{};
  auto some = [&](long k, auto read) __attribute__((always_inline)) {
    __m512bh v[R];
    for (int r = 0; r < R; r++) v[r] = (__m512bh)read(x[r] + k);
    for (int n = 0; n < N; n++) {
      const __m512bh u = (__m512bh)read(w + n * D + k);
      for (int r = 0; r < R; r++) a[r][n] = (vf)_mm512_dpbf16_ps((__m512)a[r][n], v[r], u);
    }
  };
  constexpr long whole = D / 32 * 32;
  for (long k = 0; k < whole; k += 32) some(k, [](const stored* p) { return _mm512_loadu_si512(p); });
  if constexpr (whole < D) {
    constexpr __mmask32 rest = (1u << (D - whole)) - 1;
    some(whole, [](const stored* p) { return _mm512_maskz_loadu_epi16(rest, p); });
  }
  sums<R, N>(a, out);
}
#endif

// E neurons for R rows.
template <int R, long E, class X, class W>
static inline void neurons(const X* const* x, const W* w, float* const* out) {
  // as many sums as there are registers for, beside the rows and a weight
  constexpr bool EIGHTS = E % 8 == 0 && LANES == 16 && R <= 3;
  constexpr int N = EIGHTS                    ? 8
                    : R == 1                  ? (E % 8 == 0 ? 8 : E % 6 == 0 ? 6 : 4)
                    : R == 2                  ? 6
                    : R == 4 && LANES != 16   ? 3
                                              : 4;
  float* to[R];
  auto tile = [&](auto size, long n) {
    for (int r = 0; r < R; r++) to[r] = out[r] + n;
    dots<R, decltype(size)::value>(x, w + n * D, to);
  };
  constexpr long whole = E / N * N, left = E - whole;
  for (long n = 0; n < whole; n += N) tile(std::integral_constant<int, N>(), n);
  if constexpr (left > 0) tile(std::integral_constant<int, int(left)>(), whole);
}

// E neurons for any number of rows.
template <long E, class X, class W>
static inline void neurons_of(long count, const X* const* x, const W* w, float* const* out,
                              Fetch fetch) {
  constexpr int R = LANES == 16 ? 6 : E % 4 == 0 ? 3 : 4;  // AVX-512 has twice the registers
  long r = 0;
  for (; r + R <= count; r += R) {
    fetch.some();
    if (R == 6) fetch.some();  // its share is for three rows
    neurons<R, E>(x + r, w, out + r);
  }
  if (R == 6 && count - r >= 4) {
    if (count - r == 5) return neurons<5, E>(x + r, w, out + r);
    return neurons<4, E>(x + r, w, out + r);
  }
  if (R > 3 && count - r >= 3) neurons<3, E>(x + r, w, out + r), r += 3;
  if (count - r >= 2) neurons<2, E>(x + r, w, out + r), r += 2;
  if (count - r >= 1) neurons<1, E>(x + r, w, out + r);
}
