// y[b, o] of rows of a layer: the ways in which they are multiplied, and which a layer takes.
//
//   BYTES_WAY   codes that are numbers, at most eight bits: times 16-bit inputs, summed as integers
//   WORDS_WAY   tables of few entries, looked up by shuffles: 15-bit entries times 16-bit inputs, summed as integers
//   LOADED_WAY  larger tables of vectors of four rows (with AVX2 of eight too): the same, entries loaded whole
//   ENTRIES     those of vectors of eight rows (AVX-512): entries loaded whole, and multiplied as fp32 in the order in which they lie
//   PATHS_WAY   trellis codes: decoded to a row of bytes, and multiplied like the first
//   DENSE       uncompressed weights
//   FLOATS      everything else: decoded to fp32 in registers, or a panel at a time for many inputs
//
// Integers are made anew from every sixty-four inputs, so what is lost is 2**-16 of the largest of them: a relative error of 2e-5 to 5e-5 in a product.

#pragma once

#include <math.h>
#include <new>
#include <omp.h>
#include <type_traits>

#include "inputs.h"

#define AHEAD 4096  // bytes of codes asked for in advance
#define PANEL 1024  // columns of a decoded panel

// Every line of what a later block reads: they come from memory, and the processor's own prefetching is soon lost among rows this short.
static inline void prefetch(const uint8_t *p, int64_t count) {
    for (int64_t line = 0; line < count; line += 64) _mm_prefetch((const char *)(p + line), _MM_HINT_T0);
}

static float low_rank(const Layer &l, int64_t o, const float *inputs) {
    Vec total = zero();
    float value = 0;
    int64_t r = 0;
    const int8_t *codes = (const int8_t *)l.left + o * l.rank;
    const uint16_t *numbers = (const uint16_t *)l.left + o * l.rank;
    for (; r + LANES <= l.rank; r += LANES) total = fma(l.left_scale ? bytes(codes + r) : halves(numbers + r), load(inputs + r), total);
    for (; r < l.rank; ++r) value += inputs[r] * (l.left_scale ? (float)codes[r] : wide(numbers[r]));
    return value + sum(total);
}

// Bytes from the codes of vector v to the end of all codes. What is read behind a row's own is multiplied with nothing.
static inline int64_t codes_left(const Layer &l, int64_t v) { return 4 * l.words * (l.vectors - v); }

struct Rows {
    const Layer &l;
    const Inputs &in;
    float *y;        // [batch, stride]
    int64_t stride;  // of y
    Arena &arena;

    void finish(int64_t o, int64_t b, float value) const {
        if (l.rank) value += low_rank(l, o, in.lowrank + b * l.rank);
        if (l.row_scale) value *= wide(l.row_scale[o]);
        y[b * stride + o] = value + (l.bias ? wide(l.bias[o]) : 0.0f);
    }
    float shifted(int64_t b, const float *shift) const { return in.sums ? dot(shift, in.sums + b * room(l), l.groups) : 0; }
};

// Of the rows of vector v, [dim, room]; those behind the last row are zero.
static void load_scales(const Layer &l, int64_t v, float *scale, float *shift) {
    const int64_t present = l.rows - v * l.dim < l.dim ? l.rows - v * l.dim : l.dim, each = room(l);
    if (present < l.dim) memset(scale, 0, sizeof(float) * (size_t)(l.dim * each)), memset(shift, 0, sizeof(float) * (size_t)(l.dim * each));
    for (int64_t d = 0; d < present; ++d) scales_of(l, v * l.dim + d, scale + d * each, shift + d * each);
}

// ---- fp32 ------------------------------------------------------------------------------------------------------------------------------

// Columns [from, to) of the D rows of vector v, fp32 [D, stride], whole blocks.
template <class Dec, int D, bool EVEN>
static void decode_rows(const Layer &l, int64_t v, const Dec &decoder, const float *scale, const float *shift, const Under &under, int64_t from, int64_t to, float *out, int64_t stride) {
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = codes_left(l, v);
    const bool shifted = has_shift(l);
    const int64_t each = room(l);
    for (int64_t c = from, at = from / BLOCK * 8 * l.bits; c < to; c += BLOCK, at += 8 * l.bits) {
        const int64_t g = EVEN ? c / l.group : 0;
        prefetch(codes + at + AHEAD, 8 * l.bits);
        typename Dec::Block block;
        decoder.open(codes + at, bytes - at, block);
        for (int d = 0; d < D; ++d) {
            Vec value[4];
            decoder.place(block, d, value);
            for (int k = 0; k < 4; ++k) {
                const Vec by = EVEN ? all(scale[d * each + g]) : under(scale + d * each, c / LANES + k);
                const Vec added = !shifted ? zero() : EVEN ? all(shift[d * each + g]) : under(shift + d * each, c / LANES + k);
                store(out + d * stride + (c - from) + LANES * k, fma(value[k], by, added));
            }
        }
    }
}

// y [rows, batch] += w [rows, columns] x^T, R rows and B inputs at a time in registers.
template <int R, int B> static void corner(const float *w, int64_t w_stride, const float *x, int64_t x_stride, int64_t columns, float *y, int64_t batch) {
    Vec total[R][B];
    for (int r = 0; r < R; ++r) for (int b = 0; b < B; ++b) total[r][b] = zero();
    for (int64_t c = 0; c < columns; c += LANES) {
        Vec row[R];
        for (int r = 0; r < R; ++r) row[r] = load(w + r * w_stride + c);
        for (int b = 0; b < B; ++b) {
            const Vec input = load(x + b * x_stride + c);
            for (int r = 0; r < R; ++r) total[r][b] = fma(row[r], input, total[r][b]);
        }
    }
    for (int r = 0; r < R; ++r) for (int b = 0; b < B; ++b) y[r * batch + b] += sum(total[r][b]);
}

#define CORNER (WIDE ? 4 : 2)  // as many accumulators as there are registers for
template <int R> static void multiply_panel(const float *w, int64_t w_stride, const Inputs &in, int64_t from, int64_t columns, float *y) {
    for (int64_t b = 0; b < in.batch;) {
        const float *x = in.x + b * in.stride + from;
        const int64_t left = in.batch - b;
        if (CORNER >= 4 && left >= 4) corner<R, 4>(w, w_stride, x, in.stride, columns, y + b, in.batch), b += 4;
        else if (left >= 2) corner<R, 2>(w, w_stride, x, in.stride, columns, y + b, in.batch), b += 2;
        else corner<R, 1>(w, w_stride, x, in.stride, columns, y + b, in.batch), b += 1;
    }
}

template <class Dec, int D, bool EVEN> struct Floats : Rows {
    const Dec &decoder;

    // One pass over the codes for B inputs, decoded in registers.
    template <int B> void few(int64_t begin, int64_t end) const {
        const int64_t step = 8 * l.bits, each = room(l);
        float *scale = arena.take<float>(D * each), *shift = arena.take<float>(D * each);
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, scale, shift);
            const int64_t bytes = codes_left(l, v);
            const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
            Vec total[D][B];
            for (int d = 0; d < D; ++d) for (int b = 0; b < B; ++b) total[d][b] = zero();
            int64_t g = 0, next = l.group;
            for (int64_t c = 0, at = 0; c < l.columns; c += BLOCK, at += step) {
                if (EVEN && c == next) ++g, next += l.group;
                prefetch(codes + at + AHEAD, step);
                typename Dec::Block block;
                decoder.open(codes + at, bytes - at, block);
                Vec x[B][4];
                for (int b = 0; b < B; ++b) for (int k = 0; k < 4; ++k) x[b][k] = load(in.x + b * in.stride + c + LANES * k);
                for (int d = 0; d < D; ++d) {
                    Vec value[4];
                    decoder.place(block, d, value);
                    if (!EVEN) for (int k = 0; k < 4; ++k) value[k] = times(value[k], in.under(scale + d * each, c / LANES + k));
                    for (int b = 0; b < B; ++b) {
                        Vec part = times(value[0], x[b][0]);
                        for (int k = 1; k < 4; ++k) part = fma(value[k], x[b][k], part);
                        total[d][b] = EVEN ? fma(part, all(scale[d * each + g]), total[d][b]) : plus(part, total[d][b]);
                    }
                }
            }
            for (int64_t d = 0; d < D && v * D + d < l.rows; ++d)
                for (int b = 0; b < B; ++b) finish(v * D + d, b, sum(total[d][b]) + shifted(b, shift + d * each));
        }
    }

    // A panel of rows decoded into the cache, for any number of inputs.
    void many(int64_t begin, int64_t end) const {
        const int VECTORS = D >= CORNER ? 1 : CORNER / D, ROWS = VECTORS * D;
        const int64_t width = D == 8 ? PANEL / 2 : PANEL, batch = in.batch, each = D * room(l);
        float *scale = arena.take<float>(VECTORS * each), *shift = arena.take<float>(VECTORS * each);
        float *panel = arena.zeros<float>(ROWS * width), *out = arena.take<float>(ROWS * batch);
        for (int64_t first = begin; first < end; first += VECTORS) {
            const int64_t last = first + VECTORS < end ? first + VECTORS : end;
            memset(out, 0, sizeof(float) * (size_t)(ROWS * batch));
            for (int64_t v = first; v < last; ++v) load_scales(l, v, scale + (v - first) * each, shift + (v - first) * each);
            for (int64_t from = 0; from < l.columns; from += width) {
                const int64_t to = from + width < padded(l.columns) ? from + width : padded(l.columns);
                // Behind the last vector the panel keeps older rows: their products go nowhere.
                for (int64_t v = first; v < last; ++v)
                    decode_rows<Dec, D, EVEN>(l, v, decoder, scale + (v - first) * each, shift + (v - first) * each, in.under, from, to, panel + (v - first) * D * width, width);
                for (int r = 0; r < ROWS; r += CORNER) multiply_panel<CORNER>(panel + r * width, width, in, from, to - from, out + r * batch);
            }
            for (int64_t r = 0; r < (last - first) * D && first * D + r < l.rows; ++r)
                for (int64_t b = 0; b < batch; ++b) finish(first * D + r, b, out[r * batch + b]);
        }
    }

    void operator()(int64_t begin, int64_t end) const {
        if (in.batch == 1) few<1>(begin, end);
        else if (in.batch == 2) few<2>(begin, end);
        else many(begin, end);
    }
};

// ---- larger tables ---------------------------------------------------------------------------------------------------------------------

// A block of codes of at most fourteen bits, read four at a time: eight bytes, where the row may have fewer left.
struct WholeCodes {
    const uint8_t *codes;
    const int64_t bits;
    uint8_t copy[8 * 14 + 8];

    WholeCodes(const uint8_t *p, int64_t left, int64_t bits) : codes(p), bits(bits) {
        const int64_t step = 8 * bits;
        if (left >= step + 8) return;
        memset(copy, 0, sizeof copy);
        memcpy(copy, p, (size_t)(left < step ? left : step));
        codes = copy;
    }
    uint64_t four(int64_t first) const {
        uint64_t found;
        memcpy(&found, codes + (first * bits >> 3), 8);
        return found >> (first * bits & 7);
    }
};

#if WIDE
// Lanes 16 k to 16 k + 15 of as many inputs as there are registers of them, each in `d` lanes.
static Int lanes_of(int k, int d) {
    uint8_t of_lane[LANES];
    for (int lane = 0; lane < LANES; ++lane) of_lane[lane] = (uint8_t)((k * LANES + lane) / d);
    return octets(of_lane);
}

// Entries of eight fp16 values, taken two at a time: a lane is a row of the vector, in every eighth one the same, and inputs are
// spread to match. A load for every code is what this costs; gathering the same entries place by place takes more than twice the time.
struct Entries : Rows {
    enum { D = 8 };
    // Two entries, of codes from `first` on, of the four that begin at `four`.
    static Vec entries(const uint16_t *table, uint64_t four, int first, int64_t bits) {
        uint64_t at[4];
        for (int k = 0; k < LANES / D; ++k) at[k] = four >> ((first + k) * bits) & ((1u << bits) - 1);
        const __m128i *e = (const __m128i *)table;
        return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(e + at[0])), _mm_loadu_si128(e + at[1]), 1));
    }

    template <int B> void few(int64_t first_input, int64_t begin, int64_t end) const {
        const int64_t bits = l.bits, step = 8 * bits, each = room(l), stride = in.stride;
        const uint16_t *table = l.half_table;
        float *scale = arena.take<float>(D * each), *shift = arena.take<float>(D * each);
        float *across = arena.take<float>(LANES * l.groups);  // [groups, 16]: the scale of every lane's row
        const float *inputs = in.x + first_input * stride;
        Int spread[D];  // lanes of sixteen inputs
        for (int k = 0; k < D; ++k) spread[k] = lanes_of(k, D);
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, scale, shift);
            for (int64_t g = 0; g < l.groups; ++g) for (int64_t k = 0; k < LANES; ++k) across[g * LANES + k] = scale[k % D * each + g];
            const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
            const int64_t bytes = codes_left(l, v);
            const float *by = across, *x = inputs;
            Vec total[B];
            UNROLL for (int b = 0; b < B; ++b) total[b] = zero();
            for (int64_t c = 0, at = 0, next = l.group; c < l.columns; c += BLOCK, at += step, x += BLOCK) {
                if (c == next) by += LANES, next += l.group;
                prefetch(codes + at + AHEAD, step);
                const WholeCodes whole(codes + at, bytes - at, bits);
                Vec part[B][2];
                UNROLL for (int b = 0; b < B; ++b) part[b][0] = part[b][1] = zero();
                Register sixteen[B];
                UNROLL for (int k = 0; k < BLOCK / 4; ++k) {
                    if (k % 4 == 0) UNROLL for (int b = 0; b < B; ++b) sixteen[b] = Register(x + b * stride + 4 * k);
                    const uint64_t four = whole.four(4 * k);
                    UNROLL for (int h = 0; h < D / 4; ++h) {
                        const Vec value = entries(table, four, h * (LANES / D), bits);
                        UNROLL for (int b = 0; b < B; ++b) part[b][k % 2] = fma(value, sixteen[b].at(spread[k % 4 * (D / 4) + h]), part[b][k % 2]);
                    }
                }
                UNROLL for (int b = 0; b < B; ++b) total[b] = fma(plus(part[b][0], part[b][1]), load(by), total[b]);
            }
            UNROLL for (int b = 0; b < B; ++b) {
                float lanes[LANES];
                store(lanes, total[b]);
                for (int64_t d = 0; d < D && v * D + d < l.rows; ++d) {
                    float value = 0;
                    for (int k = 0; k < LANES / D; ++k) value += lanes[k * D + d];
                    finish(v * D + d, first_input + b, value);
                }
            }
        }
    }

    void operator()(int64_t begin, int64_t end) const {
        int64_t b = 0;
        for (; b + 2 <= in.batch; b += 2) few<2>(b, begin, end);
        if (b < in.batch) few<1>(b, begin, end);
    }
};

#endif

// ---- uncompressed ----------------------------------------------------------------------------------------------------------------------

template <Dense KIND> struct Uncompressed : Rows {
    static Vec weights(const void *w, int64_t i) {
        return KIND == FP16 ? halves((const uint16_t *)w + i) : KIND == BF16 ? brains((const uint16_t *)w + i) : load((const float *)w + i);
    }

    // A row after the other is one stream of bytes, which is read at nearly twice the speed of four. Two sums a row: one would wait for itself.
    void one(int64_t o) const {
        Vec total[2] = {zero(), zero()};
        int64_t c = 0;
        for (; c + 2 * LANES <= l.columns; c += 2 * LANES)
            for (int k = 0; k < 2; ++k) total[k] = fma(weights(l.dense, o * l.columns + c + LANES * k), load(in.x + c + LANES * k), total[k]);
        float value = sum(plus(total[0], total[1]));
        for (; c < l.columns; ++c) value += number_at(l.dense, KIND, o * l.columns + c) * in.x[c];
        finish(o, 0, value);
    }

    template <int R, int B> void some(int64_t o, int64_t b) const {
        Vec total[R][B];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) total[r][k] = zero();
        const float *x = in.x + b * in.stride;
        const int64_t whole = l.columns / LANES * LANES, columns = l.columns, stride = in.stride;
        for (int64_t c = 0; c < whole; c += LANES) {
            Vec w[R];
            UNROLL for (int r = 0; r < R; ++r) w[r] = weights(l.dense, (o + r) * columns + c);
            UNROLL for (int k = 0; k < B; ++k) {
                const Vec input = load(x + k * stride + c);
                UNROLL for (int r = 0; r < R; ++r) total[r][k] = fma(w[r], input, total[r][k]);
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int k = 0; k < B; ++k) {
                float value = sum(total[r][k]);
                for (int64_t c = whole; c < l.columns; ++c) value += number_at(l.dense, KIND, (o + r) * l.columns + c) * x[k * in.stride + c];
                finish(o + r, b + k, value);
            }
    }
    template <int R> void rows(int64_t o) const {
        int64_t b = 0;
        for (; b + 4 <= in.batch; b += 4) some<R, 4>(o, b);
        for (; b < in.batch; ++b) some<R, 1>(o, b);
    }
    void operator()(int64_t begin, int64_t end) const {
        int64_t o = begin;
        if (in.batch == 1) for (; o < end; ++o) one(o);
        for (; o + 4 <= end; o += 4) rows<4>(o);
        for (; o < end; ++o) rows<1>(o);
    }
};

#include "integer_rows.h"
#include "paths.h"

// ---- which way a layer takes -----------------------------------------------------------------------------------------------------------

static inline Way way_of(const Layer &l, int64_t batch) {
    if (l.dense) return DENSE;
    if (l.window) return PATHS_WAY;
    if (l.uniform && l.bits <= 8 && (is_even(l) || l.group % 4 == 0)) return BYTES_WAY;
    if (batch > (WIDE ? 2 : 8)) return FLOATS;  // two at once: of more inputs a panel is decoded once
    // A lookup among 256 takes AVX2 thirty instructions, for thirty-two codes: vectors of many rows are loaded sooner.
    const bool loads = l.bits > (WIDE ? 8 : 6) && l.bits <= 14 && l.dim >= 4 && is_even(l);
    if (loads && l.entries && (!WIDE || l.dim == 4)) return LOADED_WAY;
    if (l.fixed && (WIDE || l.bits <= 6 || l.dim <= 2) && (is_even(l) || l.group % (4 / PAIR_SUMS) == 0)) return WORDS_WAY;
    if (WIDE && loads && l.dim == 8 && l.half_table) return ENTRIES;
    return FLOATS;
}

template <int N> using Constant = std::integral_constant<int, N>;

// Calls `then(decoder, D, EVEN)` with the decoder of a packed layer, its rows to a vector, and whether blocks lie under one scale each.
template <class Dec, int D, class Then> static void with(const Layer &l, Then then) {
    const Dec decoder(l);
    if (is_even(l)) then(decoder, Constant<D>(), std::true_type());
    else then(decoder, Constant<D>(), std::false_type());
}

template <int D, class Then> static void from_table(const Layer &l, Then then) {
    if (l.bits <= 4 && D <= 2) return with<Decoder<REGISTER, D>, D>(l, then);
#if WIDE
    if (l.planes && l.plane == 64) return with<Planes<64, D>, D>(l, then);
    if (l.planes && l.plane == 128) return with<Planes<128, D>, D>(l, then);
    if (l.planes) return with<Planes<256, D>, D>(l, then);
#endif
    with<Decoder<MEMORY, D>, D>(l, then);
}

template <class Then> static void decoded(const Layer &l, Then then) {
    if (l.uniform) with<Decoder<NUMBER, 1>, 1>(l, then);
    else if (l.dim == 1) from_table<1>(l, then);
    else if (l.dim == 2) from_table<2>(l, then);
    else if (l.dim == 4) from_table<4>(l, then);
    else from_table<8>(l, then);
}

template <int SIZE, int D> static void words(const Rows &rows, int64_t begin, int64_t end) {
    if (is_even(rows.l)) Words<SIZE, D, true>{rows}(begin, end);
    else Words<SIZE, D, false>{rows}(begin, end);
}

template <int D> static void words(const Rows &rows, int64_t begin, int64_t end) {
    if constexpr (!WIDE) {
        if (rows.l.bits <= 4) return words<16, D>(rows, begin, end);
        if (rows.l.bits == 5) return words<32, D>(rows, begin, end);
    }
    if (rows.l.plane == 64) return words<64, D>(rows, begin, end);
    if constexpr (WIDE || D <= 2) {
        if (rows.l.plane == 128) return words<128, D>(rows, begin, end);
        words<256, D>(rows, begin, end);
    }
}

// Vectors [begin, end) of rows; `rows.l.dim` rows each.
static void multiply(const Rows &rows, int64_t begin, int64_t end) {
    const Layer &l = rows.l;
    const Arena::Mark mark = rows.arena.mark();
    switch (way_of(l, rows.in.batch)) {
    case DENSE:
        if (l.dense_kind == FP16) Uncompressed<FP16>{rows}(begin, end);
        else if (l.dense_kind == BF16) Uncompressed<BF16>{rows}(begin, end);
        else Uncompressed<FP32>{rows}(begin, end);
        break;
    case BYTES_WAY:
#if !WIDE
        if (stands(l) && l.bits == 2) Bytes<true, UnpackStanding<2>>{rows}(begin, end);
        else if (stands(l)) Bytes<true, UnpackStanding<3>>{rows}(begin, end);
        else
#endif
            if (is_even(l)) Bytes<true>{rows}(begin, end);
        else Bytes<false>{rows}(begin, end);
        break;
    case WORDS_WAY:
        if (l.dim == 1) words<1>(rows, begin, end);
        else if (l.dim == 2) words<2>(rows, begin, end);
        else if (l.dim == 4) words<4>(rows, begin, end);
        else words<8>(rows, begin, end);
        break;
    case LOADED_WAY:
#if !WIDE
        if (l.dim == 8) Loaded<8, 0>{rows}(begin, end);
        else
#endif
            if (l.bits == 12) Loaded<4, 12>{rows}(begin, end);
        else Loaded<4, 0>{rows}(begin, end);
        break;
    case PATHS_WAY:
        Paths{rows}(begin, end);
        break;
#if WIDE
    case ENTRIES:
        Entries{rows}(begin, end);
        break;
#endif
    default:
        decoded(l, [&](const auto &decoder, auto dim, auto even) {
            Floats<std::decay_t<decltype(decoder)>, decltype(dim)::value, decltype(even)::value>{rows, decoder}(begin, end);
        });
    }
    rows.arena.back(mark);
}

// The base of rows [first, first + count), fp32 [count, columns], shared out to the threads of a parallel region.
static void decode_base(const Layer &l, int64_t first, int64_t count, float *out, Arena &arena) {
    if (l.window) return decode_paths(l, first, count, out, arena);
    Under under = {};
    if (!is_even(l)) under.make(l, 1, padded(l.columns), arena);
    const int64_t width = padded(l.columns);
    float *scale = arena.take<float>(l.dim * room(l)), *shift = arena.take<float>(l.dim * room(l)), *row = arena.take<float>(l.dim * width);
    decoded(l, [&](const auto &decoder, auto dim, auto even) {
        const int64_t D = decltype(dim)::value;
#pragma omp for schedule(static)
        for (int64_t v = first / D; v < (first + count + D - 1) / D; ++v) {
            load_scales(l, v, scale, shift);
            decode_rows<std::decay_t<decltype(decoder)>, decltype(dim)::value, decltype(even)::value>(l, v, decoder, scale, shift, under, 0, width, row, width);
            for (int64_t d = 0; d < D && v * D + d < first + count; ++d) memcpy(out + (v * D + d - first) * l.columns, row + d * width, sizeof(float) * (size_t)l.columns);
        }
    });
}
