// One step of a decoder of the Llama kind: rows of token trees of several sequences through all
// layers, in one parallel region whose threads meet between phases.
constexpr long MIXED = HEADS * HEAD_DIM;

struct Run {
  const Model& model;
  const Step& step;
  std::vector<Sequence> sequences;
  std::vector<int32_t> paths, starts, positions, every;
  long chunks = 1, tail = 0;
  Barrier barrier;
  float *x, *qkv, *q, *parts, *scratch, *scores, *gates, *sums;
  operand *in, *mixed, *h, *routed;
  int32_t* where;
  uint8_t* chosen;

  Run(const Model& m, const Step& s) : model(m), step(s) {
    starts.push_back(0);
    for (long i = 0; i < s.sequences; i++) {
      const long nodes = s.nodes[i + 1] - s.nodes[i], rows = s.bounds[i + 1] - s.bounds[i];
      const Sequence one{s.bounds[i], rows, s.slots[i], s.committed[i], nodes - rows, s.nodes[i]};
      sequences.push_back(one);
      for (long n = 0; n < nodes; n++) {
        const long parent = s.parents[one.node + n], above = one.node + parent;
        if (parent >= 0)
          for (long j = starts[above]; j < starts[above + 1]; j++) paths.push_back(int32_t(paths[j]));
        paths.push_back(int32_t(n));
        starts.push_back(int32_t(paths.size()));
        if (n < one.held) continue;
        positions.push_back(int32_t(one.committed + starts.back() - *(starts.end() - 2) - 1));
        chunks = std::max(chunks, positions.back() / CHUNK + 1);
      }
      tail = std::max(tail, up_to(one.committed % CHUNK + nodes, CHUNK));
    }
    for (long j = 0; j < CHUNK; j++) every.push_back(int32_t(j));
  }

  // Lay the scratch out; twice, once to learn its size.
  bool allocate(long most_experts, long most_width, bool by_gate) {
    for (int turn = 0; turn < 2; turn++) {
      arena.reset();
      const long rows = step.rows;
      x = arena.take<float>(rows * WIDTH);
      in = arena.take<operand>(rows * operands(2 * D));
      qkv = arena.take<float>(rows * up_to(QKV, LANES));
      q = arena.take<float>(rows * HEADS * HEAD_DIM);
      parts = arena.take<float>(rows * HEADS * chunks * PART);
      mixed = arena.take<operand>(rows * operands(MIXED));
      h = arena.take<operand>(rows * operands(D_FF));
      routed = arena.take<operand>(rows * operands(most_width));
      scores = arena.take<float>(rows * up_to(most_experts, LANES));
      chosen = arena.take<uint8_t>(rows * most_experts);
      gates = arena.take<float>(by_gate ? rows * GATES : 0);
      sums = arena.take<float>(by_gate ? CHOSEN_PARTS * rows * WIDTH : 0);
      scratch = arena.take<float>(step.threads * GROUP * tail);
      where = arena.take<int32_t>(step.threads * (tail + CHUNK));
      if (arena.used <= arena.size) return true;
      std::free(arena.p);
      arena.size = arena.used * 5 / 4 / 64 * 64 + 64;
      arena.p = (char*)std::aligned_alloc(64, arena.size);
      if (!arena.p) return arena.size = 0, false;
      std::memset(arena.p, 0, arena.size);  // what pads rows is read, and must be finite
    }
    return false;
  }

  static void normed(const float* from, const float* weight, float eps, operand* to, float* also) {
    vf squares{};
    for (long k = 0; k < WIDTH; k += LANES) squares = fma(load(from + k), load(from + k), squares);
    const float scale = 1.0f / std::sqrt(sum(squares) / D + eps);
    for (long k = 0; k < D; k++) {
      const float v = from[k] * scale * weight[k];
      if (to) narrow(v, to + k);
      if (also) also[k] = v;
    }
    for (long k = D; to && k < ROW; k++) narrow(0.0f, to + k);  // meets weights of zero
  }

  struct Thread {
    const long me, all;
    std::vector<int32_t> live;  // blocks of neurons, and the neurons, of experts that some row runs
    std::vector<Segment> segments;
    std::vector<float> gates;
    long first(long n) const { return n * me / all; }
    long last(long n) const { return n * (me + 1) / all; }
  };

  // Blocks index(from) .. index(to - 1) of a product over k elements, of which `segments` are
  // computed: `take(row, i, values)`.
  template <class Index, class Take>
  static void project(const operand* rows, long ld, long count, const stored* w, long k, long from,
                      long to, const Segment* segments, long parts, Index index, Take take) {
    for (long b = from; b < to; b += TILE_BLOCKS) {
      const long n = std::min((long)TILE_BLOCKS, to - b);
      const stored *at[TILE_BLOCKS], *next[TILE_BLOCKS];
      for (long v = 0; v < n; v++) {
        at[v] = w + index(b + v) * block_size(k);
        next[v] = w + index(std::min(b + v + TILE_BLOCKS, to - 1)) * block_size(k);
      }
      products(rows, ld, count, at, next, n, k, segments, parts,
               [&](long r, long v, const float* y) { take(r, b + v, y); });
    }
  }
  // This thread's share of all blocks.
  template <class Take>
  static void project(const Thread& t, const operand* rows, long ld, long count, const stored* w,
                      long k, long blocks, Take take) {
    const Segment whole{0, int32_t(k)};
    project(rows, ld, count, w, k, t.first(blocks), t.last(blocks), &whole, 1,
            [](long i) { return i; }, take);
  }

  void embed(const Thread& t) {
    const long rows = step.rows;
    for (long r = t.first(rows); r < t.last(rows); r++) {
      const stored* from = model.embedding + step.tokens[r] * D;
      float* to = x + r * WIDTH;
      for (long k = D; k < WIDTH; k++) to[k] = 0;
      if (!model.mix) {
        for (long k = 0; k < D; k++) to[k] = widen(from[k]);
        continue;
      }
      operand* row = in + r * operands(2 * D);
      for (long k = 0; k < D; k++) {
        narrow(widen(from[k]), row + k);
        narrow(step.features[r * D + k], row + D + k);
      }
    }
    if (!model.mix) return;
    barrier.meet(t.all);
    project(t, in, operands(2 * D), rows, model.mix, 2 * D, blocks_of(D),
            [&](long r, long b, const float* y) {
              std::memcpy(x + r * WIDTH + b * LANES, y, LANES * sizeof(float));
            });
  }

  // Rotary embedding of half of the pairs (i, i + ROPE / 2); what is beyond ROPE stays.
  void rotate(const float* from, const float* norm, long position, float scale, float* to) const {
    alignas(64) float v[HEAD_DIM];
    float factor = 1;
    if (norm) {
      float squares = 0;
      for (long d = 0; d < HEAD_DIM; d++) squares += from[d] * from[d];
      factor = 1.0f / std::sqrt(squares / HEAD_DIM + model.eps);
    }
    for (long d = 0; d < HEAD_DIM; d++) v[d] = norm ? from[d] * factor * norm[d] : from[d];
    const float *c = step.cosine + position * ROPE, *s = step.sine + position * ROPE;
    constexpr long HALF = ROPE / 2;
    for (long d = 0; d < HALF; d++) {
      to[d] = (v[d] * c[d] - v[d + HALF] * s[d]) * scale;
      to[d + HALF] = (v[d + HALF] * c[d + HALF] + v[d] * s[d + HALF]) * scale;
    }
    for (long d = ROPE; d < HEAD_DIM; d++) to[d] = v[d] * scale;
  }

  void attend(const Thread& t, const Layer& layer, const Cache& cache) {
    constexpr long LD = up_to(QKV, LANES);
    const long rows = step.rows;
    project(t, in, operands(D), rows, layer.qkv, D, blocks_of(QKV),
            [&](long r, long b, const float* y) {
              std::memcpy(qkv + r * LD + b * LANES, y, LANES * sizeof(float));
            });
    barrier.meet(t.all);
    const Attention a{q, cache, paths.data(), starts.data(), every.data(), parts, chunks};
    for (const Sequence& of : sequences)
      for (long i = t.first(of.rows); i < t.last(of.rows); i++) place(of, of.first + i, layer, cache);
    barrier.meet(t.all);
    long unit = 0;  // threads take turns: whole chunks first, then what is left of each row
    for (const Sequence& of : sequences)
      for (long chunk = 0; chunk < of.committed / CHUNK; chunk++)
        for (long head = 0; head < KV_HEADS; head++)
          if (unit++ % t.all == t.me) committed_chunk(a, of, head, chunk);
    for (const Sequence& of : sequences)
      for (long i = 0; i < of.rows; i++)
        for (long head = 0; head < KV_HEADS; head++)
          if (unit++ % t.all == t.me)
            rest_of_row(a, of, of.first + i, head, scratch + t.me * GROUP * tail,
                        where + t.me * (tail + CHUNK));
    barrier.meet(t.all);
    for (long i = t.first(rows * HEADS); i < t.last(rows * HEADS); i++) {
      const long row = i / HEADS, head = i % HEADS;
      merge(a, row, head, positions[row] / CHUNK + 1,
            mixed + row * operands(MIXED) + head * HEAD_DIM);
    }
    barrier.meet(t.all);
    const Segment whole{0, int32_t(MIXED)};
    add(t, mixed, operands(MIXED), layer.out, MIXED, &whole, 1);
  }

  // A row's queries, and its key and value into the cache.
  void place(const Sequence& of, long row, const Layer& layer, const Cache& cache) {
    float* y = qkv + row * up_to(QKV, LANES);
    if (layer.qkv_bias)
      for (long n = 0; n < QKV; n++) y[n] += layer.qkv_bias[n];
    const long at = of.committed + of.held + row - of.first, position = positions[row];
    for (long head = 0; head < HEADS; head++)
      rotate(y + head * HEAD_DIM, layer.q_norm, position, model.scale,
             q + (row * HEADS + head) * HEAD_DIM);
    for (long head = 0; head < KV_HEADS; head++) {
      alignas(64) float k[HEAD_DIM];
      rotate(y + (HEADS + head) * HEAD_DIM, layer.k_norm, position, 1.0f, k);
      stored* key = key_at(cache.key(of.slot, head), at);
      for (long d = 0; d < HEAD_DIM; d++) narrow(k[d], key + d * CHUNK);
      const float* v = y + (HEADS + KV_HEADS + head) * HEAD_DIM;
      stored* value = cache.value(of.slot, head) + at * VALUE;
      for (long d = 0; d < HEAD_DIM; d++) narrow(v[d], value + d);
      for (long d = HEAD_DIM; d < VALUE; d++) narrow(0.0f, value + d);
    }
  }

  // x += rows . w over segments of k elements.
  void add(const Thread& t, const operand* rows, long ld, const stored* w, long k,
           const Segment* segments, long parts) {
    project(rows, ld, step.rows, w, k, t.first(blocks_of(D)), t.last(blocks_of(D)), segments, parts,
            [](long i) { return i; },
            [&](long r, long b, const float* y) {
              float* to = x + r * WIDTH + b * LANES;
              *(vf*)to = load(to) + load(y);
            });
  }

  // The feed-forward network: every neuron, or those of the experts that some row runs.
  void feed(Thread& t, const Layer& layer) {
    if (layer.tau) return feed_by_gate(t, layer);
    const bool routed_here = step.sparse && layer.router.down;
    if (routed_here) route(t, layer.router);
    const Segment whole{0, int32_t(D)}, all{0, int32_t(D_FF)};
    const long blocks = routed_here ? long(t.live.size()) : blocks_of(D_FF), from = t.first(blocks);
    const auto neurons = [&](long i) { return routed_here ? long(t.live[i]) : i; };
    const long experts = layer.router.experts, expert_size = layer.router.expert_size;
    project(in, operands(D), step.rows, layer.gate_up, D, 2 * from, 2 * t.last(blocks), &whole, 1,
            [&](long i) { return 2 * neurons(i / 2) + i % 2; },
            [&](long r, long i, const float* y) {
              float* gate = t.gates.data() + r * LANES;
              if (i % 2 == 0) return (void)std::memcpy(gate, y, LANES * sizeof(float));
              const long n = neurons(i / 2) * LANES;
              alignas(64) float v[LANES];
#pragma omp simd
              for (long k = 0; k < LANES; k++) v[k] = act<ACT>(gate[k]) * y[k];
              if (routed_here)
                for (long k = 0; k < LANES && n + k < D_FF; k++)
                  if (!chosen[r * experts + (n + k) / expert_size]) v[k] = 0;
              for (long k = 0; k < LANES; k++) narrow(v[k], h + r * operands(D_FF) + n + k);
            });
    barrier.meet(t.all);
    add(t, h, operands(D_FF), layer.down, D_FF, routed_here ? t.segments.data() : &all,
        routed_here ? long(t.segments.size()) : 1);
  }

  // The same where the gate chooses: threads take parts of the neurons, and then columns of sums.
  void feed_by_gate(Thread& t, const Layer& layer) {
    const long rows = step.rows, size = rows * WIDTH, blocks = blocks_of(D_FF);
    const auto begin = [&](long part) { return blocks * part / CHOSEN_PARTS; };
    const long from = t.first(CHOSEN_PARTS), to = t.last(CHOSEN_PARTS);
    const Segment whole{0, int32_t(D)};
    project(in, operands(D), rows, layer.gate_up, D, begin(from), begin(to), &whole, 1,
            [](long i) { return i; },
            [&](long r, long b, const float* y) {
              float* gate = gates + r * GATES + b * LANES;
#pragma omp simd
              for (long k = 0; k < LANES; k++) gate[k] = act<ACT>(y[k]);
            });
    const float tau = *layer.tau;
    const auto needs = [&](long r, long n) { return !(std::fabs(gates[r * GATES + n]) < tau); };
    t.live.clear();
    for (long n = begin(from) * LANES; n < std::min(D_FF, begin(to) * LANES); n++) {
      bool any = false;
      for (long r = 0; r < rows && !any; r++) any = needs(r, n);
      if (any) t.live.push_back(int32_t(n));
    }
    add_parts(in, rows, layer.down, tau, t.live, from, to, begin, gates, sums);
    barrier.meet(t.all);
    for (long i = t.first(size / LANES); i < t.last(size / LANES); i++) {
      vf all{};
      for (long part = 0; part < CHOSEN_PARTS; part++) all += load(sums + part * size + i * LANES);
      *(vf*)(x + i * LANES) += all;
    }
  }

  // Which experts each row runs; then, in every thread, the blocks and neurons of all of them.
  void route(Thread& t, const Router& router) {
    const long rows = step.rows, experts = router.experts, ld = operands(router.width),
               across = up_to(experts, LANES);
    project(t, in, operands(D), rows, router.down, D, blocks_of(router.width),
            [&](long r, long b, const float* y) {
              for (long k = 0; k < LANES; k++)
                narrow(router.sigmoid ? std::tanh(y[k]) : act<1>(y[k]),
                       routed + r * ld + b * LANES + k);
            });
    barrier.meet(t.all);
    project(t, routed, ld, rows, router.up, router.width, blocks_of(experts),
            [&](long r, long b, const float* y) {
              for (long k = 0; k < LANES; k++)
                scores[r * across + b * LANES + k] =
                    router.sigmoid ? 1.0f / (1.0f + std::exp(-y[k])) : std::fabs(y[k]);
            });
    barrier.meet(t.all);
    for (long r = t.first(rows); r < t.last(rows); r++)
      choose(router, scores + r * across, chosen + r * experts);
    barrier.meet(t.all);
    t.live.clear(), t.segments.clear();
    for (long e = 0; e < experts; e++) {
      bool any = false;
      for (long r = 0; r < rows && !any; r++) any = chosen[r * experts + e];
      if (!any) continue;
      const long first = e * router.expert_size, last = first + router.expert_size;
      if (t.segments.empty() || t.segments.back().to < first / PAIR * PAIR)
        t.segments.push_back({int32_t(first / PAIR * PAIR), int32_t(last)});
      else t.segments.back().to = int32_t(last);
      for (long b = first / LANES; b <= (last - 1) / LANES; b++)
        if (t.live.empty() || t.live.back() < b) t.live.push_back(int32_t(b));
    }
  }

  // Not below tau times the largest score, as skimp.ir.op says it; a static selection first.
  static void choose(const Router& router, const float* scores, uint8_t* chosen) {
    const long experts = router.experts;
    if (router.top > 0 && router.top < experts) {
      std::vector<float> sorted(scores, scores + experts);
      std::nth_element(sorted.begin(), sorted.begin() + router.top - 1, sorted.end(),
                       std::greater<float>());
      for (long e = 0; e < experts; e++)
        chosen[e] = *router.tau <= 0 || scores[e] >= sorted[router.top - 1];
      return;
    }
    float most = scores[0];
    for (long e = 1; e < experts; e++) most = scores[e] > most ? scores[e] : most;
    for (long e = 0; e < experts; e++) chosen[e] = !(scores[e] < *router.tau * most);
  }

  void read_out(const Thread& t) {
    const long rows = step.rows, wanted = step.wanted_rows, words = model.words;
    for (long i = t.first(wanted); i < t.last(wanted); i++)
      normed(x + step.wanted[i] * WIDTH, model.norm, model.eps, in + i * operands(D), nullptr);
    for (long r = t.first(rows); r < t.last(rows); r++)
      normed(x + r * WIDTH, model.norm, model.eps, nullptr, step.hidden + r * D);
    barrier.meet(t.all);
    project(t, in, operands(D), wanted, model.head, D, blocks_of(words),
            [&](long r, long b, const float* y) {
              const long n = std::min((long)LANES, words - b * LANES);
              std::memcpy(step.logits + r * words + b * LANES, y, n * sizeof(float));
            });
  }

  void thread(long me, long all) {
    Thread t{me, all};
    t.gates.resize(step.rows * LANES);
    embed(t);
    barrier.meet(all);
    for (long i = 0; i < model.count; i++) {
      const Layer& layer = model.layers[i];
      const long first = i * step.all_slots * KV_HEADS * step.capacity;
      const Cache cache{step.keys + first * HEAD_DIM, step.values + first * VALUE, step.capacity};
      norm_rows(t, layer.norm_in);
      attend(t, layer, cache);
      barrier.meet(all);
      norm_rows(t, layer.norm_mid);
      feed(t, layer);
      barrier.meet(all);
    }
    read_out(t);
  }

  void norm_rows(const Thread& t, const float* weight) {
    for (long r = t.first(step.rows); r < t.last(step.rows); r++)
      normed(x + r * WIDTH, weight, model.eps, in + r * operands(D), nullptr);
    barrier.meet(t.all);
  }
};

// Returns 0, or 1 when memory ran out.
extern "C" int decoder_step(const Model* model, const Step* step) {
  if (step->rows == 0) return 0;
  Run run(*model, *step);
  long experts = 1, width = 1;
  bool by_gate = false;
  for (long i = 0; i < model->count; i++) by_gate |= model->layers[i].tau != nullptr;
  for (long i = 0; i < model->count && step->sparse; i++) {
    experts = std::max(experts, (long)model->layers[i].router.experts);
    width = std::max(width, (long)model->layers[i].router.width);
  }
  if (!run.allocate(experts, width, by_gate)) return 1;
#pragma omp parallel num_threads(int(step->threads))
  run.thread(omp_get_thread_num(), omp_get_num_threads());
  return 0;
}

// Positions first + from[i] of a slot become first + i, in all layers; from[] ascends.
extern "C" void decoder_keep(stored* keys, stored* values, int64_t layers, int64_t all_slots,
                             int64_t capacity, int64_t slot, int64_t first, const int64_t* from,
                             int64_t count) {
  for (long layer = 0; layer < layers; layer++) {
    const long at = layer * all_slots * KV_HEADS * capacity;
    const Cache cache{keys + at * HEAD_DIM, values + at * VALUE, capacity};
    for (long head = 0; head < KV_HEADS; head++)
      for (long i = 0; i < count; i++) {
        if (from[i] == i) continue;
        const stored* k = key_at(cache.key(slot, head), first + from[i]);
        stored* to = key_at(cache.key(slot, head), first + i);
        for (long d = 0; d < HEAD_DIM; d++) to[d * CHUNK] = k[d * CHUNK];
        stored* v = cache.value(slot, head);
        std::memcpy(v + (first + i) * VALUE, v + (first + from[i]) * VALUE, VALUE * sizeof(stored));
      }
  }
}
