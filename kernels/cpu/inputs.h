// What a layer is multiplied with: a batch of vectors, in every form that its rows ask for. Each thread makes its own: that takes less time
// than agreeing on who does.

#pragma once

#include "rotation.h"
#include "scales.h"

// Which scale each lane is under, for lanes of `width` columns: of every sixteen lanes the first one's group, and how many groups behind it each
// is. The same for all rows.
struct Under {
    int32_t *first;
    uint8_t *behind;
    bool own;  // lanes are blocks, each under a scale of its own; what those behind the last one get is not used

    void make(const Layer &l, int64_t width, int64_t lanes, Arena &arena) {
        own = width == BLOCK && l.group == BLOCK;
        first = arena.take<int32_t>(lanes / LANES);
        behind = arena.take<uint8_t>(lanes);
        int64_t g = 0, next = l.group;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            while (lane * width >= next && g + 1 < l.groups) ++g, next += l.group;  // padding is under the last one
            if (lane % LANES == 0) first[lane / LANES] = (int32_t)g;
            behind[lane] = (uint8_t)(g - first[lane / LANES]);
        }
    }
    // Of lanes 16 v to 16 v + 15: `values` is [groups] of one row, and may be read for fifteen more.
    Vec operator()(const float *values, int64_t v) const {
        if (own) return load(values + v * LANES);
        return Register(values + first[v]).at(octets(behind + v * LANES));
    }
};

struct Inputs {
    int64_t batch, stride, blocks;  // columns padded to whole blocks of 64; blocks padded to whole vectors
    const float *x;                 // [batch, stride], in the order of the codes; what integers stand for, where there are any
    const float *sums;              // [batch, room]: of the inputs under every scale, where rows have shifts; or times minus the centre; zeros behind
    const float *lowrank;           // [batch, rank]: right @ x, scaled so that what is left to do is a sum over left's codes
    const int8_t *integers;         // [batch, stride / 64, 128]: 16-bit integers, in the form of octets.h
    const float *step;              // [batch, blocks]: what a block's integers are multiplied by
    Under under;                    // of the way's lanes; of blocks of 64 where these lie under one scale each
};

// How rows are multiplied; see rows.h.
enum Way { FLOATS, BYTES_WAY, WORDS_WAY, LOADED_WAY, PATHS_WAY, ENTRIES, DENSE };

static inline Way way_of(const Layer &l, int64_t batch);

// Whether codes that are numbers are multiplied where they stand (octets.h).
static inline bool stands(const Layer &l) { return !WIDE && is_even(l) && (l.bits == 2 || l.bits == 3); }

static float low_rank_input(const Layer &l, int64_t r, const float *x) {
    const int8_t *codes = (const int8_t *)l.right + r * l.columns;
    const uint16_t *numbers = (const uint16_t *)l.right + r * l.columns;
    Vec total[2] = {zero(), zero()};
    float value = 0;
    int64_t i = 0;
    for (int k = 0; i + LANES <= l.columns; i += LANES, k ^= 1) total[k] = fma(l.right_scale ? bytes(codes + i) : halves(numbers + i), load(x + i), total[k]);
    for (; i < l.columns; ++i) value += x[i] * (l.right_scale ? (float)codes[i] : wide(numbers[i]));
    value += sum(plus(total[0], total[1]));
    return l.right_scale ? value * wide(l.right_scale[r]) * wide(l.left_scale[r]) : value;
}

// [batch, rank] of x [batch, stride].
static float *low_rank_inputs(const Layer &l, const float *x, int64_t stride, int64_t batch, Arena &arena) {
    float *lowrank = arena.take<float>(batch * l.rank);
    for (int64_t i = 0; i < batch * l.rank; ++i) lowrank[i] = low_rank_input(l, i % l.rank, x + i / l.rank * stride);
    return lowrank;
}

static inline bool rounds(const Layer &l) { return l.act_bits && l.act_bits < 16; }

static float sum_of(const float *x, int64_t count) {
    Vec total = zero();
    for (int64_t i = 0; i < count; i += LANES) total = plus(load(x + i, count - i), total);
    return sum(total);
}

static float dot(const float *a, const float *b, int64_t count) {
    Vec total = zero();
    for (int64_t i = 0; i < count; i += LANES) total = fma(load(a + i, count - i), load(b + i, count - i), total);
    return sum(total);
}

// Sixty-four inputs to integers of at most `most`, in magnitude, times the returned step. Not finite: neither is the step.
static float integers(const float *x, float most_of, Int *integer, float *rounded) {
    Vec v[4], size = zero(), odd = zero();
    for (int k = 0; k < 4; ++k) {
        v[k] = load(x + LANES * k);
        size = most(size, magnitude(v[k]));
        odd = fma(v[k], zero(), odd);
    }
    const float highest = largest(size);
    const float step = highest / most_of + sum(odd), per = highest > 1e-30f ? most_of / highest : 0;
    for (int k = 0; k < 4; ++k) {
        integer[k] = nearest(times(v[k], all(per)));
        store(rounded + LANES * k, times(number(integer[k]), all(step)));
    }
    return step;
}

static void to_integers(Inputs &in, const float *x, Form form, Arena &arena) {
    float *rounded = arena.take<float>(in.batch * in.stride), *step = arena.zeros<float>(in.batch * in.blocks);
    int8_t *to = arena.take<int8_t>(2 * in.batch * in.stride);
    for (int64_t b = 0; b < in.batch; ++b)
        for (int64_t c = 0; c < in.stride; c += BLOCK) {
            const int64_t at = b * in.stride + c;
            Int integer[4];
            step[b * in.blocks + c / BLOCK] = integers(x + at, form == FOR_NUMBERS ? LARGEST_AS_BYTES : 32767.0f, integer, rounded + at);
            store_integers(integer, form, to + 2 * at);
        }
    in.x = rounded, in.step = step, in.integers = to;
}

// Inputs of few bits, as kernels/formats/activations.py rounds them: a grid of its own for every token.
static void round_inputs(float *x, int64_t columns, int64_t bits) {
    float low = 0, high = 0;
    for (int64_t i = 0; i < columns; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    const float top = (float)((1 << bits) - 1), step = high > low ? (high - low) / top : 1.0f, origin = rintf(-low / step);
    for (int64_t i = 0; i < columns; ++i) {
        const float code = rintf(x[i] / step) + origin;
        x[i] = ((code < 0 ? 0 : code > top ? top : code) - origin) * step;
    }
}

// x [batch, stride] in the layer's own order of columns.
static void prepare(const Layer &l, const float *x, int64_t stride, int64_t batch, Arena &arena, Inputs &in) {
    memset(&in, 0, sizeof in);
    const int64_t width = padded(l.columns);
    in.batch = batch, in.stride = width, in.blocks = (width / BLOCK + LANES - 1) / LANES * LANES, in.x = x;
    float *copy = nullptr;
    if (l.rank && !l.order) in.lowrank = low_rank_inputs(l, x, stride, batch, arena);
    if (l.signs) {
        float *half = arena.take<float>(width);
        copy = arena.take<float>(batch * width);
        for (int64_t b = 0; b < batch; ++b) {
            turn_one(l, x + b * stride, copy + b * width, half);
            memset(copy + b * width + l.columns, 0, sizeof(float) * (size_t)(width - l.columns));
        }
        in.x = copy;
    } else if (l.order || l.column_scale || rounds(l) || stride != width) {
        copy = arena.take<float>(batch * width);
        for (int64_t b = 0; b < batch; ++b) {
            const float *from = x + b * stride;
            if (l.order) for (int64_t i = 0; i < l.columns; ++i) copy[b * width + i] = from[l.order[i]];
            else memcpy(copy + b * width, from, sizeof(float) * (size_t)l.columns);
            memset(copy + b * width + l.columns, 0, sizeof(float) * (size_t)(width - l.columns));
        }
        in.x = copy;
    }
    if (l.rank && l.order) in.lowrank = low_rank_inputs(l, in.x, width, batch, arena);  // `right` is in that order
    if (l.column_scale)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < l.columns; ++i) copy[b * width + i] *= l.column_scale[i];
    if (rounds(l))
        for (int64_t b = 0; b < batch; ++b) round_inputs(copy + b * width, l.columns, l.act_bits);
    const Way way = way_of(l, batch);
    if (way == DENSE) return;
    const bool numbers = way == BYTES_WAY || way == PATHS_WAY;
    if (is_even(l)) {
        in.under.make(l, BLOCK, in.blocks, arena);
    } else {
        const int64_t lane = way == BYTES_WAY ? 4 : way == WORDS_WAY ? 4 / PAIR_SUMS : 1;
        in.under.make(l, lane, width / lane, arena);
    }
    const Form form = way == BYTES_WAY && stands(l) ? FOR_STANDING : numbers ? FOR_NUMBERS : FOR_WORDS;
    if (numbers || way == WORDS_WAY || way == LOADED_WAY) to_integers(in, in.x, form, arena);
    const bool centred = numbers && l.centre != 0;
    if (has_shift(l) || centred) {
        float *sums = arena.zeros<float>(batch * room(l));
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t g = 0; g < l.groups; ++g) sums[b * room(l) + g] = sum_of(in.x + b * width + g * l.group, columns_under(l, g)) * (centred ? -(float)l.centre : 1.0f);
        in.sums = sums;
    }
}
