// y = x . w^T + b for few rows: threads take neurons, and each weight is read once for all rows.
// Several layers of one shape that read the same x, such as an attention's projections, are one
// call: the threads meet once, and x is laid out once.
//
// A handful of rows: a sum runs along the width of x, and its lanes are added up at the end. More:
// a vector holds one element of each row, which leaves nothing to add up, and weights are spread
// to all lanes as they are read.
constexpr long AT_ONCE = 8;  // neurons whose weights stay in the first cache while the rows pass
constexpr long MOST = 64;
constexpr long HANDFUL = LANES / 2;

static inline void put(stored* y, const stored* b, long row, long n, float value) {
  narrow(value + (B_IN ? widen(b[n]) : 0.0f), y + row * D_OUT + n);
}

template <long E>
static inline void along_width(const float* const* x, const stored* w, const stored* b, stored* y,
                               long rows, long n) {
  float h[HANDFUL][E], *to[HANDFUL];
  for (long r = 0; r < rows; r++) to[r] = h[r];
  neurons_of<E>(rows, x, w + n * D, to, n + 2 * E <= D_OUT
                    ? Fetch(w + (n + E) * D, E * D * sizeof(stored), rows / 3)
                    : Fetch());
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < E; i++) put(y, b, r, n + i, h[r][i]);
}

// N neurons for V vectors of rows; x[k] holds element k of each of them. The weights of the
// neurons that follow, `ahead` of them, are fetched meanwhile.
template <int V, int N>
static inline void across_rows(const float* x, const float* w, const stored* b, stored* y,
                               long rows, long n, const stored* next, long ahead) {
  vf a[N][V];
  for (int i = 0; i < N; i++)
    for (int v = 0; v < V; v++) a[i][v] = vf{};
  constexpr long LINE = 64 / sizeof(stored);
  for (long line = 0; line < D; line += LINE) {
    for (long i = 0; i < ahead; i++) __builtin_prefetch(next + i * D + line, 0, 2);
    for (long k = line; k < std::min(D, line + LINE); k++) {
      vf u[V];
      for (int v = 0; v < V; v++) u[v] = load(x + (k * V + v) * LANES);
      for (int i = 0; i < N; i++) {
        vf f = splat(w[i * D + k]);
        for (int v = 0; v < V; v++) a[i][v] += u[v] * f;
      }
    }
  }
  for (long r = 0; r < rows; r++)
    for (int i = 0; i < N; i++) put(y, b, r, n + i, a[i][r / LANES][r % LANES]);
}

// What a call computes: `count` layers, y[i] = x . w[i]^T + b[i].
struct Layers {
  const stored* const* w;
  const stored* const* b;
  stored* const* y;
  long count;
};

// Neurons [first, last) of every layer for at most V vectors of rows, from row `from` on.
template <int V>
static void vectors_of_rows(const stored* x, const Layers& layers, long from, long rows, long first,
                            long last, float* turned, float* wide) {
  constexpr int REGISTERS = LANES == 16 ? 32 : 16;
  constexpr int N = std::min(12, (REGISTERS - 2 - V) / V);
  for (long k = 0; k < D; k++)
    for (long r = 0; r < V * LANES; r++)
      turned[k * V * LANES + r] = r < rows ? widen(x[(from + r) * D + k]) : 0.0f;
  for (long i = 0; i < layers.count; i++) {
    const stored *w = layers.w[i], *b = layers.b[i];
    stored* y = layers.y[i] + from * D_OUT;
    auto weights = [&](long n, long count) -> const float* {
      if constexpr (sizeof(stored) == 4) return (const float*)(w + n * D);
      for (long j = 0; j < count * D; j++) wide[j] = widen(w[n * D + j]);
      return wide;
    };
    long n = first;
    auto some = [&](auto count) {
      constexpr int C = decltype(count)::value;
      for (; n + C <= last; n += C)
        across_rows<V, C>(turned, weights(n, C), b, y, rows, n, w + (n + C) * D,
                          std::min((long)C, last - n - C));
    };
    some(std::integral_constant<int, N>());
    if constexpr (N > 4) some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
  }
}

// A handful of rows: this thread's share of the neurons of every layer.
static bool handful_of_rows(const stored* x, const Layers& layers, long rows, long me, long all) {
  Buffer<float> wide(sizeof(stored) == 2 ? rows * D : 1);
  if (!wide.p) return false;
  const float* from[HANDFUL];
  for (long r = 0; r < rows; r++) {
    from[r] = sizeof(stored) == 2 ? wide.p + r * D : (const float*)(x + r * D);
    for (long k = 0; sizeof(stored) == 2 && k < D; k++) wide.p[r * D + k] = widen(x[r * D + k]);
  }
  constexpr long whole = D_OUT / AT_ONCE, left = D_OUT % AT_ONCE;
  for (long i = 0; i < layers.count; i++) {
    for (long n = whole * me / all; n < whole * (me + 1) / all; n++)
      along_width<AT_ONCE>(from, layers.w[i], layers.b[i], layers.y[i], rows, n * AT_ONCE);
    if constexpr (left > 0)
      if (me == all - 1)
        along_width<left>(from, layers.w[i], layers.b[i], layers.y[i], rows, whole * AT_ONCE);
  }
  return true;
}

// b holds null pointers where layers have no bias.
// Returns 0, 1 when memory ran out, or 2 for more rows than this is written for.
extern "C" int linear(const stored* x, const stored* const* w, const stored* const* b,
                      stored* const* y, int64_t count, int64_t rows, int32_t threads) {
  if (rows > MOST) return 2;
  const Layers layers{w, b, y, long(count)};
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const long me = omp_get_thread_num(), all = omp_get_num_threads();
    if (rows <= HANDFUL) {
      failed = !handful_of_rows(x, layers, rows, me, all);
    } else {
      constexpr long CHUNK = (LANES == 16 ? 4 : 2) * LANES;
      Buffer<float> turned(D * CHUNK), wide(sizeof(stored) == 2 ? D * 32 : 1);
      failed = !turned.p || !wide.p;
      const long first = D_OUT * me / all, last = D_OUT * (me + 1) / all;
      for (long r = 0; r < rows && !failed; r += CHUNK) {
        const long n = std::min(CHUNK, rows - r);
        auto run = [&](auto v) {
          vectors_of_rows<decltype(v)::value>(x, layers, r, n, first, last, turned.p, wide.p);
        };
        if (n <= LANES) run(std::integral_constant<int, 1>());
        else if (n <= 2 * LANES) run(std::integral_constant<int, 2>());
        else if constexpr (LANES == 16)
          n <= 3 * LANES ? run(std::integral_constant<int, 3>())
                         : run(std::integral_constant<int, 4>());
      }
    }
  }
  return failed;
}
