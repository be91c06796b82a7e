// One token of a language model of the Llama family, from its number to the logits, without leaving.
//
// Five times a block all threads wait for each other: behind the three projections of the attention, the attention, its output, the two
// projections of the MLP, and its output. What is short (norms, residuals, the forms of a product's inputs) every thread does for itself.

#pragma once

#include <math.h>
#include <omp.h>

#include "elementwise.h"
#include "team.h"

class Token {
    const Model &m;
    const int64_t batch, position, threads;
    Team team;
    Arena shared;
    float *queries, *attended, *inner, *output;  // [batch, heads * head_dim] twice, [batch, inner], [batch, hidden]
    float *best;                                 // [threads, batch]: the largest logits seen
    int64_t *best_at;

    // y = x / root mean square(x) * weight; y may be x.
    void normed(const float *x, const float *weight, int64_t count, float *y) const {
        const float by = 1 / sqrtf(dot(x, x, count) / (float)count + (float)m.epsilon);
        for (int64_t i = 0; i < count; ++i) y[i] = x[i] * by * weight[i];
    }

    // A head's queries or keys: normed, and turned by their position.
    void turned(const DecoderBlock &block, const float *norm, float *head) const {
        const int64_t size = m.head_dim, half = size / 2;
        if (norm) normed(head, norm, size, head);
        const float *cosine = block.cosines + position * size, *sine = block.sines + position * size;
        for (int64_t i = 0; i < half; ++i) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cosine[i] - b * sine[i], head[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
    }

    // Rows of one head of a projection, for all sequences, at the head's place in out [batch, heads * head_dim].
    void project(const Layer &l, const Inputs &in, int64_t head, float *out, Arena &arena) const {
        multiply({l, in, out, l.rows, arena}, head * m.head_dim / l.dim, (head + 1) * m.head_dim / l.dim);
    }

    void attend(const DecoderBlock &block, int64_t b, int64_t head, Arena &arena) const {
        const int64_t size = m.head_dim, kv = head / (m.heads / m.kv_heads), end = position + 1;
        const int64_t begin = block.window && end > block.window ? end - block.window : 0, count = end - begin;
        const float *query = queries + (b * m.heads + head) * size;
        const float *keys = block.keys + ((b * m.kv_heads + kv) * m.positions + begin) * size;
        const float *values = block.values + ((b * m.kv_heads + kv) * m.positions + begin) * size;
        const Arena::Mark mark = arena.mark();
        float *weight = arena.take<float>(count + LANES), most_ = -INFINITY;
        for (int64_t t = 0; t < count; t += 4) {  // four positions at once; behind the last, the last again
            Vec v[4] = {zero(), zero(), zero(), zero()};
            const float *key[4];
            for (int k = 0; k < 4; ++k) key[k] = keys + (t + k < count ? t + k : count - 1) * size;
            for (int64_t i = 0; i < size; i += LANES) {
                const Vec q = load(query + i, size - i);
                for (int k = 0; k < 4; ++k) v[k] = fma(q, load(key[k] + i, size - i), v[k]);
            }
            sums(v, weight + t);
        }
        for (int64_t t = 0; t < count; ++t) {
            weight[t] *= (float)m.attention_scale;
            if (m.attention_cap != 0) weight[t] = (float)m.attention_cap * tanhf(weight[t] / (float)m.attention_cap);
            most_ = fmaxf(most_, weight[t]);
        }
        for (int64_t t = count; t % LANES; ++t) weight[t] = -INFINITY;
        Vec sums = zero();
        for (int64_t t = 0; t < count; t += LANES) {
            Vec e = exponential(minus(load(weight + t), all(most_)));
            store(weight + t, e);
            sums = plus(sums, load(weight + t, count - t));
        }
        const float by = 1 / sum(sums);
        float *out = attended + (b * m.heads + head) * size;
        for (int64_t i = 0; i < size; i += LANES) {
            Vec total[2] = {zero(), zero()};
            int64_t t = 0;
            for (; t + 2 <= count; t += 2)
                for (int k = 0; k < 2; ++k) total[k] = fma(all(weight[t + k]), load(values + (t + k) * size + i), total[k]);
            if (t < count) total[0] = fma(all(weight[t]), load(values + t * size + i), total[0]);
            store(out + i, times(plus(total[0], total[1]), all(by)));
        }
        arena.back(mark);
    }

    // hidden += output, through a norm of its own where the architecture has one.
    void add(float *hidden, const float *norm, Arena &arena) const {
        const Arena::Mark mark = arena.mark();
        float *change = arena.take<float>(m.hidden);
        for (int64_t b = 0; b < batch; ++b) {
            const float *y = output + b * m.hidden;
            if (norm) normed(y, norm, m.hidden, change), y = change;
            for (int64_t i = 0; i < m.hidden; ++i) hidden[b * m.hidden + i] += y[i];
        }
        arena.back(mark);
    }

    // A stage is done. Until the others are, the first bytes of the thread's share of the next layer are on their way.
    void finished(int64_t thread, const Layer &after) {
        const int64_t row = after.dense ? after.columns * (after.dense_kind == FP32 ? 4 : 2) : 4 * after.words, count = after.vectors;
        const uint8_t *codes = after.dense ? (const uint8_t *)after.dense : (const uint8_t *)after.codes;
        const int64_t begin = team.first(thread, count) * row, left = count * row - begin;
        prefetch(codes + begin, left < AHEAD ? left : AHEAD);
        team.wait();
    }

    void rows_of(int64_t stage, int64_t thread, const Layer &l, const float *x, float *y, const Layer &after, Arena &arena) {
        Inputs in;
        prepare(l, x, l.columns, batch, arena, in);
        const int64_t count = l.vectors, share = chunk(count, l.columns * l.dim * batch, threads);
        team.share(stage, (count + share - 1) / share, thread, [&](int64_t t) { multiply({l, in, y, l.rows, arena}, t * share, (t + 1) * share < count ? (t + 1) * share : count); });
        finished(thread, after);
    }

    void run(const int64_t *ids, float *logits, int64_t thread) {
        team.meet();
        Arena arena;
        float *hidden = arena.take<float>(batch * m.hidden), *x = arena.take<float>(batch * m.hidden);
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < m.hidden; ++i) hidden[b * m.hidden + i] = number_at(m.embedding, (Dense)m.embedding_kind, ids[b] * m.hidden + i) * (float)m.embedding_scale;
        int64_t stage = 0;
        for (int64_t n = 0; n < m.blocks; ++n) {
            const DecoderBlock &block = m.block[n];
            const Arena::Mark mark = arena.mark();
            for (int64_t b = 0; b < batch; ++b) normed(hidden + b * m.hidden, block.norm_before_attention, m.hidden, x + b * m.hidden);
            attention_inputs(stage++, thread, block, x, arena);
            team.share(stage++, batch * m.heads, thread, [&](int64_t t) { attend(block, t / m.heads, t % m.heads, arena); });
            finished(thread, *block.output);
            rows_of(stage++, thread, *block.output, attended, output, *block.gate, arena);
            add(hidden, block.norm_after_attention, arena);
            for (int64_t b = 0; b < batch; ++b) normed(hidden + b * m.hidden, block.norm_before_mlp, m.hidden, x + b * m.hidden);
            activations(stage++, thread, block, x, arena);
            rows_of(stage++, thread, *block.down, inner, output, n + 1 < m.blocks ? *m.block[n + 1].query : *m.head, arena);
            add(hidden, block.norm_after_mlp, arena);
            arena.back(mark);
        }
        for (int64_t b = 0; b < batch; ++b) normed(hidden + b * m.hidden, m.norm, m.hidden, x + b * m.hidden);
        head(stage, thread, x, logits, arena);
    }

    void attention_inputs(int64_t stage, int64_t thread, const DecoderBlock &block, const float *x, Arena &arena) {
        Inputs of_query, of_key, of_value;
        prepare(*block.query, x, m.hidden, batch, arena, of_query);
        prepare(*block.key, x, m.hidden, batch, arena, of_key);
        prepare(*block.value, x, m.hidden, batch, arena, of_value);
        const int64_t size = m.head_dim;
        team.share(stage, m.heads + 2 * m.kv_heads, thread, [&](int64_t t) {
            const Arena::Mark mark = arena.mark();
            if (t < m.heads) {
                project(*block.query, of_query, t, queries, arena);
                for (int64_t b = 0; b < batch; ++b) turned(block, block.norm_query, queries + (b * m.heads + t) * size);
            } else {
                const bool is_key = t < m.heads + m.kv_heads;
                const int64_t h = (t - m.heads) % m.kv_heads;
                float *made = arena.take<float>(batch * m.kv_heads * size);
                project(is_key ? *block.key : *block.value, is_key ? of_key : of_value, h, made, arena);
                for (int64_t b = 0; b < batch; ++b) {
                    float *one = made + (b * m.kv_heads + h) * size;
                    if (is_key) turned(block, block.norm_key, one);
                    memcpy((is_key ? block.keys : block.values) + ((b * m.kv_heads + h) * m.positions + position) * size, one, sizeof(float) * (size_t)size);
                }
            }
            arena.back(mark);
        });
        team.wait();
    }

    // inner = activation(gate x) * up x, a few rows of both at a time.
    void activations(int64_t stage, int64_t thread, const DecoderBlock &block, const float *x, Arena &arena) {
        Inputs of_gate, of_up;
        prepare(*block.gate, x, m.hidden, batch, arena, of_gate);
        prepare(*block.up, x, m.hidden, batch, arena, of_up);
        const int64_t share = chunk(m.inner, 2 * m.hidden * batch, threads);  // a multiple of every vector length
        float *up = arena.take<float>(batch * m.inner);
        team.share(stage, (m.inner + share - 1) / share, thread, [&](int64_t t) {
            const int64_t first = t * share, end = first + share < m.inner ? first + share : m.inner;
            const Layer &g = *block.gate, &u = *block.up;
            multiply({g, of_gate, inner, m.inner, arena}, first / g.dim, (end + g.dim - 1) / g.dim);
            multiply({u, of_up, up, m.inner, arena}, first / u.dim, (end + u.dim - 1) / u.dim);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t i = first; i < end; i += LANES) {
                    float *at = inner + b * m.inner + i, copy[LANES];
                    const Vec gate = load(at, end - i);
                    store(copy, times(m.gelu ? gelu(gate) : silu(gate), load(up + b * m.inner + i, end - i)));
                    memcpy(at, copy, sizeof(float) * (size_t)(end - i < LANES ? end - i : LANES));
                }
        });
        finished(thread, *block.down);
    }

    void head(int64_t stage, int64_t thread, const float *x, float *logits, Arena &arena) {
        const Layer &l = *m.head;
        Inputs in;
        prepare(l, x, l.columns, batch, arena, in);
        const int64_t share = chunk(l.rows, l.columns * batch, threads);
        team.share(stage, (l.rows + share - 1) / share, thread, [&](int64_t t) {
            const int64_t first = t * share, end = first + share < l.rows ? first + share : l.rows;
            multiply({l, in, logits, l.rows, arena}, first / l.dim, (end + l.dim - 1) / l.dim);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t o = first; o < end; ++o) {
                    float &value = logits[b * l.rows + o];
                    if (m.logit_cap != 0) value = (float)m.logit_cap * tanhf(value / (float)m.logit_cap);
                    if (value > best[thread * batch + b]) best[thread * batch + b] = value, best_at[thread * batch + b] = o;
                }
        });
    }

  public:
    Token(const Model &m, int64_t batch, int64_t position, int64_t threads) : m(m), batch(batch), position(position), threads(threads), team(threads, 5 * m.blocks + 1) {
        queries = shared.take<float>(batch * m.heads * m.head_dim), attended = shared.take<float>(batch * m.heads * m.head_dim);
        inner = shared.take<float>(batch * m.inner), output = shared.take<float>(batch * m.hidden);
        best = shared.take<float>(threads * batch), best_at = shared.take<int64_t>(threads * batch);
        for (int64_t i = 0; i < threads * batch; ++i) best[i] = -INFINITY, best_at[i] = m.head->rows;
    }

    void operator()(const int64_t *ids, float *logits, int64_t *next) {
#pragma omp parallel num_threads((int)threads)
        run(ids, logits, omp_get_thread_num());
        for (int64_t b = 0; b < batch; ++b) {
            int64_t chosen = 0;
            for (int64_t t = 1; t < threads; ++t) {
                const float a = best[t * batch + b], other = best[chosen * batch + b];
                if (a > other || (a == other && best_at[t * batch + b] < best_at[chosen * batch + b])) chosen = t;
            }
            next[b] = best_at[chosen * batch + b] < m.vocabulary ? best_at[chosen * batch + b] : 0;  // nothing but not-a-number: the first
        }
    }
};
