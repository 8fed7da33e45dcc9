// y = x . w^T + b for few rows: threads take neurons, and each weight is read once for all rows.
constexpr long AT_ONCE = 8;  // neurons whose weights stay in the first cache while the rows pass
constexpr long MOST = 64;

template <long E>
static inline void outputs(const float* const* x, const stored* w, const stored* b, stored* y,
                           long rows, long n) {
  float h[MOST][E], *to[MOST];
  for (long r = 0; r < rows; r++) to[r] = h[r];
  neurons_of<E>(rows, x, w + n * D, to, n + 2 * E <= D_OUT
                    ? Fetch(w + (n + E) * D, E * D * sizeof(stored), rows / 3)
                    : Fetch());
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < E; i++)
      narrow(h[r][i] + (B_IN ? widen(b[n + i]) : 0.0f), y + r * D_OUT + n + i);
}

// Returns 0, 1 when memory ran out, or 2 for more rows than this is written for.
extern "C" int linear(const stored* x, const stored* w, const stored* b, stored* y, int64_t rows,
                      int32_t threads) {
  if (rows > MOST) return 2;
  Buffer<float> wide(sizeof(stored) == 2 ? rows * D : 1);
  if (!wide.p) return 1;
  const float* from[MOST];
  for (long r = 0; r < rows; r++) {
    if constexpr (sizeof(stored) == 2) {
      for (long k = 0; k < D; k++) wide.p[r * D + k] = widen(x[r * D + k]);
      from[r] = wide.p + r * D;
    } else {
      from[r] = (const float*)(x + r * D);
    }
  }
  constexpr long whole = D_OUT / AT_ONCE, left = D_OUT % AT_ONCE;
#pragma omp parallel num_threads(threads)
  {
    const long me = omp_get_thread_num(), all = omp_get_num_threads();
    for (long i = whole * me / all; i < whole * (me + 1) / all; i++)
      outputs<AT_ONCE>(from, w, b, y, rows, i * AT_ONCE);
    if constexpr (left > 0)
      if (me == all - 1) outputs<left>(from, w, b, y, rows, whole * AT_ONCE);
  }
  return 0;
}
