// A feed-forward network whose gate is the router of its neurons: of the other two matrices only
// those neurons are read whose gate some row needs. A neuron's weights of both lie side by side, so
// that what is left out is not in the lines that are read, nor in those that the processor fetches
// ahead. Every sum has one order, whatever the rows, threads and neurons at hand, as in
// decoder_tile.h: neurons are summed in CHOSEN_PARTS parts, and those then from first to last.
constexpr long ROW = up_to(D, LANES * PAIR);  // of a neuron's weights, padded with zeros
constexpr long CHOSEN_PARTS = 16;
constexpr int WIDE_ROWS = 4, TOGETHER = LANES == 16 ? 4 : 2;  // of sums that fit the registers
// Neurons that go through both products before others do: of few rows, as many as are on their way
// meanwhile; of more, as many as stay in the cache.
constexpr long kept(long rows) {
  return rows <= WIDE_ROWS ? TOGETHER : std::max(8L, (256L << 10) / long(ROW * sizeof(stored)));
}
// The weights of listed neurons, fetched line after line while those before them are used.
struct Stream {
  const stored* neurons;
  const int32_t *at, *end;
  const char* line = nullptr;
  long left = 0;
  void fetch(long lines) {
    for (; lines > 0; lines--, left--, line += 64) {
      if (left == 0) {
        if (at == end) return;
        line = (const char*)(neurons + *at++ * 2 * ROW), left = (2 * ROW * sizeof(stored) + 63) / 64;
      }
      __builtin_prefetch(line, 0, 2);
    }
  }
};
struct Chosen {
  const int32_t* live;
  long count;
};

// A vector's sum, by halves.
static inline float total(vf v) {
  float s[LANES];
  std::memcpy(s, &v, sizeof s);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
}

// out[r][n] = x[r] . w[n], R rows by N neurons.
template <int R, int N>
static __attribute__((noinline)) void dots(const operand* x, long ld, const stored* const* w,
                                           Stream& stream, float* out) {
  vf a[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) a[r][n] = vf{};
#if defined(STORAGE_BF16) && defined(__AVX512BF16__)
  for (long k = 0; k < ROW; k += 2 * LANES) {
    __m512bh u[N];
    for (int n = 0; n < N; n++) u[n] = (__m512bh)_mm512_loadu_si512(w[n] + k);
    stream.fetch(N);
    for (int r = 0; r < R; r++) {
      const __m512bh f = (__m512bh)_mm512_loadu_si512(x + r * ld + k);
      for (int n = 0; n < N; n++) a[r][n] = (vf)_mm512_dpbf16_ps((__m512)a[r][n], f, u[n]);
    }
  }
#else
  for (long k = 0; k < ROW; k += LANES) {
    vf u[N];
    for (int n = 0; n < N; n++) u[n] = load(w[n] + k);
    if (k * sizeof(stored) % 64 == 0) stream.fetch(N);
    for (int r = 0; r < R; r++) {
      const vf f = load(x + r * ld + k);
      for (int n = 0; n < N; n++) a[r][n] = fma(f, u[n], a[r][n]);
    }
  }
#endif
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) out[r * N + n] = total(a[r][n]);
}

// to[r] += h[r][n] w[n] over some neurons, R rows by V vectors of columns.
template <int R, int V>
static __attribute__((noinline)) void columns(const float* h, const stored* w, const Chosen& some,
                                              Stream& stream, float* to) {
  vf a[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) a[r][v] = load(to + r * WIDTH + v * LANES);
  for (long j = 0; j < some.count; j++) {
    const stored* row = w + some.live[j] * 2 * ROW;
    stream.fetch(V * LANES * sizeof(stored) / 64);
    vf u[V];
    for (int v = 0; v < V; v++) u[v] = load(row + v * LANES);
    for (int r = 0; r < R; r++) {
      const vf f = splat(h[r * GATES + some.live[j]]);
      for (int v = 0; v < V; v++) a[r][v] = fma(f, u[v], a[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *(vf*)(to + r * WIDTH + v * LANES) = a[r][v];
}

// Gates h [rows][GATES] of some neurons become their activations: times the second input, or 0
// where a row does not need the neuron.
static inline void weigh(const operand* x, long rows, const stored* neurons, float tau,
                         const Chosen& some, Stream& stream, float* h) {
  Stream none{neurons, nullptr, nullptr};
  for (long j = 0; j < some.count; j += TOGETHER) {
    const long n = std::min((long)TOGETHER, some.count - j);
    const stored* w[TOGETHER];
    for (long i = 0; i < n; i++) w[i] = neurons + some.live[j + i] * 2 * ROW;
    for (long r = 0; r < rows; r += WIDE_ROWS)
      constant<TOGETHER>(n, [&](auto together) {
        constant<WIDE_ROWS>(std::min((long)WIDE_ROWS, rows - r), [&](auto tall) {
          constexpr int R = decltype(tall)::value, N = decltype(together)::value;
          float out[R * N];
          dots<R, N>(x + r * operands(D), operands(D), w, r ? none : stream, out);
          for (int a = 0; a < R; a++)
            for (int b = 0; b < N; b++) {
              float& gate = h[(r + a) * GATES + some.live[j + b]];
              gate = std::fabs(gate) < tau ? 0.0f : gate * out[a * N + b];
            }
        });
      });
  }
}

// sums [rows][WIDTH] += h times the second weights of some neurons.
static inline void add_neurons(const float* h, long rows, const stored* neurons,
                               const Chosen& some, Stream& stream, float* sums) {
  Stream none{neurons, nullptr, nullptr};
  constexpr int MANY = LANES == 16 ? 6 : 2;  // by WIDE_ROWS sums, which fit the registers
  for (long r = 0; r < rows; r += WIDE_ROWS)
    constant<WIDE_ROWS>(std::min((long)WIDE_ROWS, rows - r), [&](auto tall) {
      constexpr int R = decltype(tall)::value, MOST = R == 1 ? 12 : MANY;
      for (long c = 0; c < blocks_of(D); c += MOST)
        constant<MOST>(std::min((long)MOST, blocks_of(D) - c), [&](auto vectors) {
          columns<R, decltype(vectors)::value>(h + r * GATES, neurons + ROW + c * LANES, some,
                                               r ? none : stream, sums + r * WIDTH + c * LANES);
        });
    });
}

// The sums [part][rows][WIDTH] of parts from .. to - 1 of the neurons, of which `live` run; part i
// begins at block begin(i).
template <class Begin>
static inline void add_parts(const operand* x, long rows, const stored* neurons, float tau,
                             const std::vector<int32_t>& live, long from, long to, Begin begin,
                             float* h, float* sums) {
  const int32_t *at = live.data(), *end = at + live.size();
  Stream stream{neurons, at, end};
  stream.fetch(TOGETHER * 2 * ROW * sizeof(stored) / 64);
  for (long part = from; part < to; part++) {
    float* sum = sums + part * rows * WIDTH;
    std::fill(sum, sum + rows * WIDTH, 0.0f);
    const int32_t* stop = std::lower_bound(at, end, begin(part + 1) * LANES);
    while (at < stop) {
      const Chosen some{at, std::min(kept(rows), stop - at)};
      weigh(x, rows, neurons, tau, some, stream, h);
      add_neurons(h, rows, neurons, some, stream, sum);
      at += some.count;
    }
  }
}
