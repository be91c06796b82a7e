// Fused decode-and-multiply on packed layers: y[b, o] = row_scale[o] * sum_i (base[o, i] + left[o] . right[:, i]) x[b, i] + bias[o],
// with the base decoded in registers and never in memory.
//
// Reads the stored layout as it is (kernels/formats/bitpack.py): codes of `bits` bits in a little-endian stream, one stream per row. A block of 64
// columns is 8 * bits whole bytes. One or two inputs are multiplied as a block is decoded; for more, a panel of a few rows is decoded into the
// first-level cache and multiplied with all of them there. Compiled once per instruction set (kernels/cpu/build.py).
//
// Rows are shared out to OpenMP threads; each row is computed by one thread in one order, so results repeat bitwise.

#include <omp.h>
#include <stdlib.h>

#include "decoders.h"

#define AHEAD 4096        // bytes of codes asked for in advance
#define PANEL 1024        // columns of a decoded panel
#define ALONE (1 << 17)   // weights that one thread multiplies sooner than two agree on sharing them

static inline int64_t columns_under(const Layer &l, int64_t g) {  // scale g of a row
    return l.columns - g * l.group < l.group ? l.columns - g * l.group : l.group;
}
static inline int64_t padded(int64_t columns) { return (columns + BLOCK - 1) / BLOCK * BLOCK; }

// Zeros, whose first lies at the start of a line of the cache: panels whose vectors lie across two lines cost an eighth of a product's time.
static float *floats(int64_t count) {
    const size_t bytes = (sizeof(float) * (size_t)count + 63) / 64 * 64;
    return (float *)memset(aligned_alloc(64, bytes), 0, bytes);
}

// ---- scales ----------------------------------------------------------------------------------------------------------------------------

static inline float wide(uint16_t half) { return _cvtsh_ss(half); }

static inline uint32_t code_at(const uint32_t *stream, int64_t index, int64_t bits) {
    const int64_t bit = index * bits, word = bit >> 5, shift = bit & 31;
    uint64_t two = stream[word];
    if (shift + bits > 32) two |= (uint64_t)stream[word + 1] << 32;
    return (uint32_t)(two >> shift) & ((1u << bits) - 1);
}

// Eight at a time, the rest one by one.
static void converted(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < count; ++i) to[i] = wide(from[i]);
}

static void mapped(const uint8_t *code, const float *map, float size, float offset, int64_t count, float *to) {
    const __m256 sizes = _mm256_set1_ps(size), offsets = _mm256_set1_ps(offset);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code + i)));
        const __m256 value = map ? _mm256_i32gather_ps(map, index, 4) : _mm256_cvtepi32_ps(index);
        _mm256_storeu_ps(to + i, _mm256_fmadd_ps(value, sizes, offsets));
    }
    for (; i < count; ++i) to[i] = __builtin_fmaf(map ? map[code[i]] : (float)code[i], size, offset);
}

// What the values of every group of a row are multiplied by, and what is added to them.
static void scales_of(const Layer &l, int64_t row, float *scale, float *shift) {
    const int64_t first = row * l.groups;
    if (l.half) {
        converted(l.half + first, l.groups, scale);
    } else {
        int64_t step = first / l.per_step, left = (step + 1) * l.per_step - first;  // one division a row, none a scale
        for (int64_t g = 0; g < l.groups; ++step, left = l.per_step) {
            const int64_t end = g + left < l.groups ? g + left : l.groups;
            const float size = l.steps[step], offset = (float)l.offset;
            if (l.scale_bits == 8) {
                mapped((const uint8_t *)l.scale_codes + first + g, l.map, size, offset, end - g, scale + g);
                g = end;
            } else {
                for (; g < end; ++g) scale[g] = (float)code_at((const uint32_t *)l.scale_codes, first + g, l.scale_bits) * size + offset;
            }
        }
    }
    if (l.minima) {
        converted(l.minima + first, l.groups, shift);
    } else if (l.zeros) {
        for (int64_t g = 0; g < l.groups; ++g) shift[g] = -scale[g] * (float)code_at(l.zeros, first + g, l.bits);
    } else if (l.centre != 0) {
        for (int64_t g = 0; g < l.groups; ++g) shift[g] = -scale[g] * (float)l.centre;
    }
}

// What a vector of rows is multiplied with: its scales and shifts [dim, groups].
struct Scales { float *scale, *shift; };

struct Scratch {  // of a thread: the scales of `vectors` vectors at once
    int64_t groups;
    float *memory;  // sixteen scales are read from wherever a group begins
    Scratch(const Layer &l, int vectors) : groups(l.dim * l.groups), memory(floats(vectors * 2 * groups + LANES)) {}
    ~Scratch() { free(memory); }
    Scales of(int64_t k) const {
        float *scale = memory + k * 2 * groups;
        return {scale, scale + groups};
    }
};

static bool is_even(const Layer &l) { return l.groups == 1 || l.group % BLOCK == 0; }
static bool has_shift(const Layer &l) { return l.minima || l.zeros || l.centre != 0; }

// Where blocks lie under more than one scale: of every sixteen columns the first one's group, and how many groups behind it each is. The
// same for all rows.
struct Under {
    int64_t *first;
    uint8_t *behind;
    explicit Under(const Layer &l, bool even) : first(0), behind(0) {
        if (even) return;
        const int64_t columns = padded(l.columns);
        first = (int64_t *)malloc((size_t)(columns / LANES) * sizeof(int64_t) + (size_t)columns);
        behind = (uint8_t *)(first + columns / LANES);
        for (int64_t c = 0, g = 0, next = l.group; c < columns; ++c) {
            if (c == next && g + 1 < l.groups) ++g, next += l.group;  // padding is under the last one
            if (c % LANES == 0) first[c / LANES] = g;
            behind[c] = (uint8_t)(g - first[c / LANES]);
        }
    }
    ~Under() { free(first); }
    // Of columns c to c + 15: `values` is [groups] of one row.
    Vec operator()(const float *values, int64_t c) const { return Register(values + first[c / LANES]).at(octets(behind + c)); }
};

static void load_scales(const Layer &l, int64_t v, const Scales &s) {
    const int64_t present = l.rows - v * l.dim < l.dim ? l.rows - v * l.dim : l.dim;
    if (present < l.dim) memset(s.scale, 0, sizeof(float) * (size_t)(2 * l.dim * l.groups));
    for (int64_t d = 0; d < present; ++d) scales_of(l, v * l.dim + d, s.scale + d * l.groups, s.shift + d * l.groups);
}

// ---- products --------------------------------------------------------------------------------------------------------------------------

// Every line of what a later block reads: they come from memory, and the processor's own prefetching is soon lost among rows this short.
static inline void prefetch(const uint8_t *p, int64_t count) {
    for (int64_t line = 0; line < count; line += 64) _mm_prefetch((const char *)(p + line), _MM_HINT_T0);
}

struct Input {  // fp32, columns padded with zeros to whole blocks
    const float *x;
    const float *sums;  // [batch, groups]: of the inputs under every scale
    int64_t stride;
};

// The D rows of vector v times BATCH inputs, multiplied as they are decoded. EVEN: a block lies under one scale.
template <class Dec, int D, int BATCH, bool EVEN>
static void multiply_rows(const Layer &l, int64_t v, const Dec &decoder, const Input &in, const Scales &s, const Under &under, float *y) {
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = 4 * l.words, step = 8 * l.bits;
    Vec total[D][BATCH];
    for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) total[d][b] = zero();
    int64_t g = 0, next = l.group;
    for (int64_t c = 0, at = 0; c < l.columns; c += BLOCK, at += step) {
        if (EVEN && c == next) ++g, next += l.group;
        prefetch(codes + at + AHEAD, step);
        typename Dec::Block block;
        decoder.open(codes + at, bytes - at, block);
        Vec x[BATCH][4];
        for (int b = 0; b < BATCH; ++b) for (int k = 0; k < 4; ++k) x[b][k] = load(in.x + b * in.stride + c + LANES * k);
        for (int d = 0; d < D; ++d) {
            Vec value[4];
            decoder.place(block, d, value);
            if (!EVEN) for (int k = 0; k < 4; ++k) value[k] = times(value[k], under(s.scale + d * l.groups, c + LANES * k));
            for (int b = 0; b < BATCH; ++b) {
                Vec part = times(value[0], x[b][0]);
                for (int k = 1; k < 4; ++k) part = fma(value[k], x[b][k], part);
                total[d][b] = EVEN ? fma(part, all(s.scale[d * l.groups + g]), total[d][b]) : fma(part, all(1.0f), total[d][b]);
            }
        }
    }
    for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) y[d * BATCH + b] = sum(total[d][b]);
}

// Columns [from, to) of the D rows of vector v, fp32 [D, stride], whole blocks.
template <class Dec, int D, bool EVEN>
static void decode_rows(const Layer &l, int64_t v, const Dec &decoder, const Scales &s, const Under &under, int64_t from, int64_t to, float *out, int64_t stride) {
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = 4 * l.words;
    for (int64_t c = from, at = from / BLOCK * 8 * l.bits; c < to; c += BLOCK, at += 8 * l.bits) {
        const int64_t g = EVEN ? c / l.group : 0;
        prefetch(codes + at + AHEAD, 8 * l.bits);
        typename Dec::Block block;
        decoder.open(codes + at, bytes - at, block);
        for (int d = 0; d < D; ++d) {
            Vec value[4];
            decoder.place(block, d, value);
            for (int k = 0; k < 4; ++k) {
                const Vec scale = EVEN ? all(s.scale[d * l.groups + g]) : under(s.scale + d * l.groups, c + LANES * k);
                const Vec shift = EVEN ? all(s.shift[d * l.groups + g]) : under(s.shift + d * l.groups, c + LANES * k);
                store(out + d * stride + (c - from) + LANES * k, fma(value[k], scale, shift));
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

#define CORNER (PLANES ? 4 : 2)  // as many accumulators as there are registers for
template <int R> static void multiply_panel(const float *w, int64_t w_stride, const Input &in, int64_t from, int64_t columns, int64_t batch, float *y) {
    for (int64_t b = 0; b < batch;) {
        const float *x = in.x + b * in.stride + from;
        const int64_t left = batch - b;
        if (CORNER >= 4 && left >= 4) corner<R, 4>(w, w_stride, x, in.stride, columns, y + b, batch), b += 4;
        else if (left >= 2) corner<R, 2>(w, w_stride, x, in.stride, columns, y + b, batch), b += 2;
        else corner<R, 1>(w, w_stride, x, in.stride, columns, y + b, batch), b += 1;
    }
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

static void finish(const Layer &l, int64_t o, int64_t batch, const float *sums, const float *lowrank, float *y) {
    for (int64_t b = 0; b < batch; ++b) {
        float value = sums[b];
        if (l.rank) value += low_rank(l, o, lowrank + b * l.rank);
        if (l.row_scale) value *= wide(l.row_scale[o]);
        y[b * l.rows + o] = value + (l.bias ? wide(l.bias[o]) : 0.0f);
    }
}

// right @ x for one component, scaled so that what is left to do is a sum over left's codes.
static float low_rank_input(const Layer &l, int64_t r, const float *x) {
    const int8_t *codes = (const int8_t *)l.right + r * l.columns;
    const uint16_t *numbers = (const uint16_t *)l.right + r * l.columns;
    Vec total[2] = {zero(), zero()};
    float value = 0;
    int64_t i = 0;
    for (int k = 0; i + LANES <= l.columns; i += LANES, k ^= 1) total[k] = fma(l.right_scale ? bytes(codes + i) : halves(numbers + i), load(x + i), total[k]);
    for (; i < l.columns; ++i) value += x[i] * (l.right_scale ? (float)codes[i] : wide(numbers[i]));
    value += sum(total[0]) + sum(total[1]);
    return l.right_scale ? value * wide(l.right_scale[r]) * wide(l.left_scale[r]) : value;
}

static float sum_of(const float *x, int64_t count) {
    Vec total = zero();
    float value = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) total = fma(load(x + i), all(1.0f), total);
    for (; i < count; ++i) value += x[i];
    return value + sum(total);
}

static float dot(const float *a, const float *b, int64_t count) {
    Vec total = zero();
    float value = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) total = fma(load(a + i), load(b + i), total);
    for (; i < count; ++i) value += a[i] * b[i];
    return value + sum(total);
}

template <class Dec, int D, bool EVEN> struct Product {
    const Layer &l;
    const Dec &decoder;

    // One pass over the codes for BATCH inputs, decoded in registers.
    template <int BATCH> void few(const Input &in, const Under &under, const float *lowrank, float *y) const {
        Scratch scratch(l, 1);
        const Scales s = scratch.of(0);
        float out[D * BATCH];
#pragma omp for schedule(static)
        for (int64_t v = 0; v < (l.rows + D - 1) / D; ++v) {
            load_scales(l, v, s);
            multiply_rows<Dec, D, BATCH, EVEN>(l, v, decoder, in, s, under, out);
            for (int64_t d = 0; d < D && v * D + d < l.rows; ++d) {
                for (int b = 0; in.sums && b < BATCH; ++b) out[d * BATCH + b] += dot(s.shift + d * l.groups, in.sums + b * l.groups, l.groups);
                finish(l, v * D + d, BATCH, out + d * BATCH, lowrank, y);
            }
        }
    }

    // A panel of rows decoded into the cache, for any number of inputs.
    void many(const Input &in, const Under &under, int64_t batch, const float *lowrank, float *y) const {
        const int VECTORS = D >= CORNER ? 1 : CORNER / D, ROWS = VECTORS * D;
        const int64_t vectors = (l.rows + D - 1) / D, width = D == 8 ? PANEL / 2 : PANEL;
        Scratch scratch(l, VECTORS);
        float *panel = floats(ROWS * (width + batch)), *out = panel + ROWS * width;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < (vectors + VECTORS - 1) / VECTORS; ++tile) {
            const int64_t first = tile * VECTORS, end = first + VECTORS < vectors ? first + VECTORS : vectors;
            memset(out, 0, sizeof(float) * (size_t)(ROWS * batch));
            for (int64_t v = first; v < end; ++v) load_scales(l, v, scratch.of(v - first));
            for (int64_t from = 0; from < l.columns; from += width) {
                const int64_t to = from + width < padded(l.columns) ? from + width : padded(l.columns);
                // Behind the last vector the panel keeps older rows: their products go nowhere.
                for (int64_t v = first; v < end; ++v)
                    decode_rows<Dec, D, EVEN>(l, v, decoder, scratch.of(v - first), under, from, to, panel + (v - first) * D * width, width);
                for (int r = 0; r < ROWS; r += CORNER) multiply_panel<CORNER>(panel + r * width, width, in, from, to - from, batch, out + r * batch);
            }
            for (int64_t r = 0; r < ROWS && tile * ROWS + r < l.rows; ++r) finish(l, tile * ROWS + r, batch, out + r * batch, lowrank, y);
        }
        free(panel);
    }

    void operator()(const float *x, int64_t stride, int64_t batch, float *y, int64_t threads) const {
        const bool sums_wanted = batch <= 2 && has_shift(l), copied = stride < padded(l.columns);
        const int64_t width = copied ? padded(l.columns) : stride;
        float *sums = floats(batch * (l.groups + l.rank + (copied ? width : 0)) + 1);
        float *lowrank = sums + batch * l.groups, *copy = lowrank + batch * l.rank;
        if (copied) for (int64_t b = 0; b < batch; ++b) memcpy(copy + b * width, x + b * stride, sizeof(float) * (size_t)l.columns);
        const Input in = {copied ? copy : x, sums_wanted ? sums : 0, width};
        if (sums_wanted)
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t g = 0; g < l.groups; ++g) sums[b * l.groups + g] = sum_of(in.x + b * width + g * l.group, columns_under(l, g));
        const Under under(l, EVEN);
#pragma omp parallel num_threads((int)(l.rows * l.columns * batch <= ALONE ? 1 : threads))
        {
            if (l.rank) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < batch * l.rank; ++i) lowrank[i] = low_rank_input(l, i % l.rank, in.x + i / l.rank * width);
            }
            if (batch == 1) few<1>(in, under, lowrank, y);
            else if (batch == 2) few<2>(in, under, lowrank, y);
            else many(in, under, batch, lowrank, y);
        }
        free(sums);
    }
};

template <class Dec, int D, bool EVEN> struct Decode {
    const Layer &l;
    const Dec &decoder;

    void operator()(int64_t first, int64_t count, float *out, int64_t threads) const {
        const Under under(l, EVEN);
#pragma omp parallel num_threads((int)threads)
        {
            Scratch scratch(l, 1);
            const Scales s = scratch.of(0);
            float *row = floats(D * padded(l.columns));
#pragma omp for schedule(static)
            for (int64_t v = first / D; v < (first + count + D - 1) / D; ++v) {
                load_scales(l, v, s);
                decode_rows<Dec, D, EVEN>(l, v, decoder, s, under, 0, padded(l.columns), row, padded(l.columns));
                for (int64_t d = 0; d < D && v * D + d < first + count; ++d)
                    memcpy(out + (v * D + d - first) * l.columns, row + d * padded(l.columns), sizeof(float) * (size_t)l.columns);
            }
            free(row);
        }
    }
};

// ---- which decoder a layer takes -------------------------------------------------------------------------------------------------------

template <template <class, int, bool> class Do, class Dec, int D, class... Arguments> static void with(const Layer &l, Arguments... arguments) {
    const Dec decoder(l);
    if (is_even(l)) Do<Dec, D, true>{l, decoder}(arguments...);
    else Do<Dec, D, false>{l, decoder}(arguments...);
}

template <template <class, int, bool> class Do, int D, class... Arguments> static void from_table(const Layer &l, Arguments... arguments) {
#if PLANES
    if (l.planes && l.plane == 64) return with<Do, Planes<64, D>, D>(l, arguments...);
    if (l.planes && l.plane == 128) return with<Do, Planes<128, D>, D>(l, arguments...);
    if (l.planes) return with<Do, Planes<256, D>, D>(l, arguments...);
#endif
    with<Do, Decoder<MEMORY, D>, D>(l, arguments...);
}

template <template <class, int, bool> class Do, class... Arguments> static void dispatch(const Layer &l, Arguments... arguments) {
    const bool in_registers = l.table && l.bits <= 4;
    if (!l.table) with<Do, Decoder<NUMBER, 1>, 1>(l, arguments...);
    else if (l.dim == 1 && in_registers) with<Do, Decoder<REGISTER, 1>, 1>(l, arguments...);
    else if (l.dim == 2 && in_registers) with<Do, Decoder<REGISTER, 2>, 2>(l, arguments...);
    else if (l.dim == 1) from_table<Do, 1>(l, arguments...);
    else if (l.dim == 2) from_table<Do, 2>(l, arguments...);
    else if (l.dim == 4) from_table<Do, 4>(l, arguments...);
    else from_table<Do, 8>(l, arguments...);
}

extern "C" {

// y [batch, rows] of x [batch, stride]; columns from the layer's to the stride, if any, are zero.
void product(const Layer *layer, const float *x, int64_t stride, int64_t batch, float *y, int64_t threads) {
    dispatch<Product>(*layer, x, stride, batch, y, threads);
}

// The base of rows [first, first + count), fp32 [count, columns]; `first` is a multiple of the vector length.
void decode(const Layer *layer, int64_t first, int64_t count, float *out, int64_t threads) {
    dispatch<Decode>(*layer, first, count, out, threads);
}

}  // extern "C"
