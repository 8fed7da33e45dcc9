// Attention of the rows of token trees over a cache.
//
// A row attends to its sequence's committed positions, then to its ancestors among the nodes that
// are not committed, then to itself: `position` + 1 tokens. They are taken in chunks of 64 by position, each
// with its own maximum, sum and weighted values, and the chunks are put together in order (as in
// flash decoding). A chunk's arithmetic is the same whether its tokens are committed or drafted, so
// a node of a tree gets, to the bit, what decoding its path one by one gives.
//
// The cache of one sequence, layer and key-value head: keys by chunk as [HEAD_DIM][64], so that
// lanes are positions, and values as [position][VALUE]. Nodes are written behind the committed
// positions in their order.
constexpr long CHUNK = 64;
constexpr long GROUP = HEADS / KV_HEADS;  // queries that share keys and values
constexpr long VALUE = up_to(HEAD_DIM, LANES);
constexpr long QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr long PART = VALUE + LANES;  // weighted values, then maximum and sum
constexpr int QUERIES = LANES == 16 ? 6 : 3;  // by 4 vectors of sums, which fit the registers
constexpr long columns_at_once(long vectors) {
  for (long n = 4; n > 1; n--)
    if (vectors % n == 0) return n;
  return 1;
}

struct Cache {
  stored *keys, *values;
  long capacity;  // positions, a multiple of CHUNK
  stored* key(long slot, long head) const {
    return keys + (slot * KV_HEADS + head) * capacity * HEAD_DIM;
  }
  stored* value(long slot, long head) const {
    return values + (slot * KV_HEADS + head) * capacity * VALUE;
  }
};
static inline stored* key_at(stored* keys, long position) {  // its elements are CHUNK apart
  return keys + position / CHUNK * CHUNK * HEAD_DIM + position % CHUNK;
}

// s[r][j] = q[r] . key of position j of a chunk
template <int R>
static inline void chunk_scores(const float* const* q, const stored* keys, float* const* s) {
  constexpr long V = columns_at_once(CHUNK / LANES);
  for (long c = 0; c < CHUNK; c += V * LANES) {
    vf a[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) a[r][v] = vf{};
    for (long d = 0; d < HEAD_DIM; d++) {
      vf u[V];
      for (int v = 0; v < V; v++) u[v] = load(keys + d * CHUNK + c + v * LANES);
      for (int r = 0; r < R; r++) {
        const vf f = splat(q[r][d]);
        for (int v = 0; v < V; v++) a[r][v] = fma(f, u[v], a[r][v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) *(vf*)(s[r] + c + v * LANES) = a[r][v];
  }
}

// out[r] = sum over j of s[r][j] * value of position where[j]
template <int R>
static inline void weighted_values(const float* const* s, const stored* values,
                                   const int32_t* where, long count, float* const* out) {
  constexpr long V = columns_at_once(VALUE / LANES);
  for (long c = 0; c < VALUE; c += V * LANES) {
    vf a[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) a[r][v] = vf{};
    for (long j = 0; j < count; j++) {
      const stored* from = values + where[j] * VALUE + c;
      vf u[V];
      for (int v = 0; v < V; v++) u[v] = load(from + v * LANES);
      for (int r = 0; r < R; r++) {
        const vf f = splat(s[r][j]);
        for (int v = 0; v < V; v++) a[r][v] = fma(f, u[v], a[r][v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) *(vf*)(out[r] + c + v * LANES) = a[r][v];
  }
}

// Never inlined, so that it is one arithmetic wherever it is called.
// Scores of a chunk, -inf where there is no token, become weights; maximum and sum go to `part`.
static __attribute__((noinline)) void soften(float* s, float* part) {
  float most = s[0];
  for (long j = 1; j < CHUNK; j++) most = s[j] > most ? s[j] : most;
#pragma omp simd
  for (long j = 0; j < CHUNK; j++) s[j] = exp_(s[j] - most);
  vf total{};
  for (long j = 0; j < CHUNK; j += LANES) total += load(s + j);
  part[VALUE] = most;
  part[VALUE + 1] = sum(total);
}

// A sequence of a step: its rows [first, first + rows), its slot of the cache, committed positions,
// and nodes: those of earlier steps that are not committed, `held` of them, and its rows.
struct Sequence {
  long first, rows, slot, committed, held, node;
  long node_of(long row) const { return node + held + row - first; }
};

// What attention reads and writes in a layer. `paths[starts[i] .. starts[i + 1])` is the path to
// node i from the top, both ends included, counted from its sequence's first node.
struct Attention {
  const float* q;  // [rows][HEADS][HEAD_DIM], scaled
  Cache cache;
  const int32_t *paths, *starts, *every;  // every: 0 .. CHUNK
  float* parts;                           // [rows][HEADS][most][PART]
  long most;
  float* part(long row, long head, long chunk) const {
    return parts + ((row * HEADS + head) * most + chunk) * PART;
  }
};

// A chunk of committed positions, for all rows of a sequence and the queries of one key-value head.
static void committed_chunk(const Attention& a, const Sequence& of, long head, long chunk) {
  const stored* keys = a.cache.key(of.slot, head) + chunk * CHUNK * HEAD_DIM;
  const stored* values = a.cache.value(of.slot, head) + chunk * CHUNK * VALUE;
  alignas(64) float scores[QUERIES][CHUNK];
  const long queries = of.rows * GROUP;
  for (long first = 0; first < queries; first += QUERIES) {
    const float* q[QUERIES];
    float *s[QUERIES], *to[QUERIES];
    const long n = std::min((long)QUERIES, queries - first);
    for (long i = 0; i < n; i++) {
      const long row = of.first + (first + i) / GROUP, h = head * GROUP + (first + i) % GROUP;
      q[i] = a.q + (row * HEADS + h) * HEAD_DIM;
      s[i] = scores[i];
      to[i] = a.part(row, h, chunk);
    }
    constant<QUERIES>(n, [&](auto r) {
      constexpr int R = decltype(r)::value;
      chunk_scores<R>(q, keys, s);
      for (int i = 0; i < R; i++) soften(s[i], to[i]);
      weighted_values<R>(s, values, a.every, CHUNK, to);
    });
  }
}

// The rest of one row's tokens: committed positions that fill no chunk, and its path. `scores` has
// room for all positions from the last whole chunk on, GROUP times; `where` for one time.
static void rest_of_row(const Attention& a, const Sequence& of, long row, long head, float* scores,
                        int32_t* where) {
  const long base = of.committed / CHUNK * CHUNK, first = of.committed - base;
  const stored* keys = a.cache.key(of.slot, head) + base * HEAD_DIM;
  const stored* values = a.cache.value(of.slot, head) + base * VALUE;
  const int32_t* path = a.paths + a.starts[of.node_of(row)];
  const long length = a.starts[of.node_of(row) + 1] - a.starts[of.node_of(row)];
  const long count = first + length;
  for (long j = 0; j < first; j++) where[j] = int32_t(j);
  for (long j = 0; j < length; j++) where[first + j] = int32_t(first + path[j]);
  const long held = up_to(where[count - 1] + 1, CHUNK);
  alignas(64) float chunk[QUERIES][CHUNK];
  for (long g = 0; g < GROUP; g += QUERIES) {
    const long n = std::min((long)QUERIES, GROUP - g);
    const float *q[QUERIES], *weights[QUERIES];
    float *s[QUERIES], *to[QUERIES];
    for (long i = 0; i < n; i++) q[i] = a.q + (row * HEADS + head * GROUP + g + i) * HEAD_DIM;
    constant<QUERIES>(n, [&](auto r) {
      constexpr int R = decltype(r)::value;
      for (long c = 0; c < held; c += CHUNK) {
        for (int i = 0; i < R; i++) s[i] = scores + i * held + c;
        chunk_scores<R>(q, keys + c * HEAD_DIM, s);
      }
      for (long c = 0; c < count; c += CHUNK) {
        const long some = std::min(CHUNK, count - c);
        for (int i = 0; i < R; i++) {
          for (long j = 0; j < CHUNK; j++)
            chunk[i][j] = j < some ? scores[i * held + where[c + j]] : -INFINITY;
          to[i] = a.part(row, head * GROUP + g + i, (base + c) / CHUNK);
          soften(chunk[i], to[i]);
          weights[i] = chunk[i];
        }
        weighted_values<R>(weights, values, where + c, some, to);
      }
    });
  }
}

// One query's chunks put together.
static void merge(const Attention& a, long row, long head, long chunks, operand* out) {
  float most = -INFINITY, total = 0;
  for (long c = 0; c < chunks; c++) most = std::max(most, a.part(row, head, c)[VALUE]);
  alignas(64) float y[VALUE] = {};
  for (long c = 0; c < chunks; c++) {
    const float* part = a.part(row, head, c);
    const float f = exp_(part[VALUE] - most);
    total += f * part[VALUE + 1];
    for (long d = 0; d < VALUE; d += LANES)
      *(vf*)(y + d) = fma(splat(f), load(part + d), load(y + d));
  }
  const float scale = 1.0f / total;
  for (long d = 0; d < HEAD_DIM; d++) narrow(y[d] * scale, out + d);
}
