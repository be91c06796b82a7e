// Fused decode-and-multiply on packed layers: y[b, o] = row_scale[o] * sum_i (base[o, i] + left[o] . right[:, i]) x[b, i] + bias[o],
// with the base decoded in registers and never in memory; and a decoder of language models that stays in here for a whole token (model.h).
//
// Reads the stored layout as it is (kernels/formats/bitpack.py): codes of `bits` bits in a little-endian stream, one stream per row. A block of 64
// columns is 8 * bits whole bytes. Compiled once per instruction set (kernels/cpu/build.py).
//
// Rows are shared out to threads; each row is computed by one thread in one order, so results repeat bitwise.

#include "logits.h"
#include "model.h"

extern "C" {

// y [batch, rows] of x [batch, columns].
void product(const Layer *layer, const float *x, int64_t batch, float *y, int64_t threads) {
    const Layer &l = *layer;
    const int64_t count = l.vectors, shares = l.rows * l.columns * batch <= ALONE ? 1 : threads, share = chunk(count, l.columns * l.dim * batch, shares);
    Team team(shares, 1);
#pragma omp parallel num_threads((int)shares)
    {
        team.meet();
        Arena arena;
        Inputs in;
        prepare(l, x, l.columns, batch, arena, in);
        const Rows rows = {l, in, y, l.rows, arena};
        team.share(0, (count + share - 1) / share, omp_get_thread_num(), [&](int64_t t) { multiply(rows, t * share, (t + 1) * share < count ? (t + 1) * share : count); });
    }
}

// The base of rows [first, first + count), fp32 [count, columns]; `first` is a multiple of the vector length.
void decode(const Layer *layer, int64_t first, int64_t count, float *out, int64_t threads) {
    const Layer &l = *layer;
#pragma omp parallel num_threads((int)threads)
    {
        Arena arena;
        decode_base(l, first, count, out, arena);
    }
}

// Inputs [count, columns] as a layer's rotation turns them.
void turn(const Layer *layer, const float *x, int64_t count, float *out, int64_t threads) {
    const int64_t columns = layer->columns;
#pragma omp parallel num_threads((int)threads)
    {
        Arena arena;
        float *half = arena.take<float>(columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) turn_one(*layer, x + i * columns, out + i * columns, half);
    }
}

// Logits [batch, vocabulary] behind one token of every sequence, at `position`, and the likeliest next tokens.
void step(const Model *model, const int64_t *ids, int64_t batch, int64_t position, float *logits, int64_t *next, int64_t threads) {
    Token(*model, batch, position, threads)(ids, logits, next);
}

// Of rows of the model's logits [n, vocabulary], and of the reference's (null: none).
void compare(const float *logits, const float *reference, int64_t n, int64_t vocabulary, Compared *found, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t i = 0; i < n; ++i) found[i] = compare_row(logits + i * vocabulary, reference ? reference + i * vocabulary : nullptr, vocabulary);
}

}  // extern "C"
