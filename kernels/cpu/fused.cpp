// Fused decode-and-multiply on packed layers: y[b, o] = row_scale[o] * sum_i (base[o, i] + left[o] . right[:, i]) x[b, i] + bias[o],
// with the base decoded in registers and never in memory.
//
// Reads the stored layout as it is (kernels/bitpack.py): codes of `bits` bits in a little-endian stream, one stream per row. Sixteen codes are
// 2 * bits whole bytes, so a chunk of sixteen columns begins on a byte: lane l is the 32-bit word at its byte l * bits / 8, shifted right by
// l * bits % 8 (lanes.h). Compiled once per instruction set (kernels/cpu/build.py).
//
// Rows are shared out to OpenMP threads; each row is computed by one thread in one order, so results repeat bitwise.

#include <omp.h>
#include <stdlib.h>

#include "lanes.h"

#define AHEAD 1024  // bytes of codes asked for in advance

extern "C" {

// A layer's stored tensors; what its format lacks is null. Mirrored field by field in kernels/cpu/layer.py.
typedef struct {
    int64_t rows, columns;    // of the weight
    int64_t bits, dim;        // of a code; weights to a code: consecutive rows of one column
    int64_t words;            // 32-bit words in a row of codes
    const uint32_t *codes;    // [ceil(rows / dim), words]
    const float *table;       // fp32 [2**bits, dim]; null: a code is its own value
    int64_t group, groups;    // columns under a scale, scales to a row
    const uint16_t *half;     // fp16 scales [rows, groups], or
    const void *scale_codes;  // codes of scales [rows * groups], uint8 or a stream of
    int64_t scale_bits;       // that many bits, with
    const float *map;         // the value of each (null: itself),
    const float *steps;       // a step for every
    int64_t per_step;         // of them,
    double offset;            // and an offset
    const uint16_t *minima;   // fp16 [rows, groups], added to scale * value; or
    const uint32_t *zeros;    // one stream [rows * groups] of `bits` bits, taken from the value; or
    double centre;            // the same zero for all
    int64_t rank;
    const void *left, *right;                        // [rows, rank], [rank, columns]: int8 with
    const uint16_t *left_scale, *right_scale;        // fp16 scales [rank], or (null) fp16
    const uint16_t *row_scale, *bias;                // fp16 [rows]
} Layer;

}  // extern "C"

static inline int64_t columns_under(const Layer &l, int64_t g) {  // scale g of a row
    return l.columns - g * l.group < l.group ? l.columns - g * l.group : l.group;
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
static void halves(const uint16_t *from, int64_t count, float *to) {
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
        halves(l.half + first, l.groups, scale);
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
        halves(l.minima + first, l.groups, shift);
    } else if (l.zeros) {
        for (int64_t g = 0; g < l.groups; ++g) shift[g] = -scale[g] * (float)code_at(l.zeros, first + g, l.bits);
    } else if (l.centre != 0) {
        for (int64_t g = 0; g < l.groups; ++g) shift[g] = -scale[g] * (float)l.centre;
    }
}

// ---- products --------------------------------------------------------------------------------------------------------------------------

struct Input {  // fp32, columns padded with zeros to whole chunks
    const float *x;
    const float *sums;  // [batch, groups]: of the inputs under every scale
    int64_t stride;
};

// One row of scalar codes. Four chunks at a time where groups allow it: four chains of additions, none of which waits for itself.
template <int BATCH, int REGISTERS> static void scalar_row(const Layer &l, int64_t row, const Unpack &unpack, const Table &table, const Input &in,
                                                           const float *scale, const float *shift, float *y) {
    const uint8_t *codes = (const uint8_t *)(l.codes + row * l.words);
    const int64_t bytes = 4 * l.words, step = 2 * unpack.bits;
    const int CHAINS = BATCH <= 2 ? 4 : BATCH <= 4 ? 2 : 1;
    Vec total[BATCH][CHAINS];
    float moved[BATCH] = {0};
    for (int b = 0; b < BATCH; ++b) for (int k = 0; k < CHAINS; ++k) total[b][k] = zero();
    for (int64_t g = 0, at = 0; g < l.groups; ++g) {
        const int64_t columns = columns_under(l, g);
        const float *x = in.x + g * l.group;
        const Vec s = all(scale[g]);
        int64_t c = 0;
        if (REGISTERS == 1)
            for (; c + 4 * LANES <= columns; c += 4 * LANES, at += 4 * step) {
                Int code[4];
                _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);
                unpack.four(codes + at, code);
                for (int k = 0; k < 4; ++k) {
                    const Vec value = times(table.template at<REGISTERS>(code[k]), s);
                    for (int b = 0; b < BATCH; ++b) total[b][k % CHAINS] = fma(value, load(x + b * in.stride + c + LANES * k), total[b][k % CHAINS]);
                }
            }
        for (; c < columns; c += LANES, at += step) {
            _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);
            const Int code = unpack(codes + at, bytes - at);
            const Vec value = times(REGISTERS < 0 ? number(code) : table.template at<REGISTERS>(code), s);
            for (int b = 0; b < BATCH; ++b) total[b][0] = fma(value, load(x + b * in.stride + c), total[b][0]);
        }
        for (int b = 0; b < BATCH; ++b) moved[b] += shift[g] * in.sums[b * l.groups + g];
    }
    for (int b = 0; b < BATCH; ++b) {
        y[b] = moved[b];
        for (int k = 0; k < CHAINS; ++k) y[b] += sum(total[b][k]);
    }
}

// `D` rows of vector codes whose table is in registers: one table of values for each place of a vector.
template <int BATCH, int D, int REGISTERS> static void vector_rows(const Layer &l, int64_t v, const Unpack &unpack, const Table *table, const Input &in,
                                                                   const float *scale, float *y) {
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = 4 * l.words, step = 2 * unpack.bits;
    Vec total[D][BATCH];
    for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) total[d][b] = zero();
    for (int64_t g = 0, at = 0; g < l.groups; ++g) {
        const int64_t columns = columns_under(l, g);
        Vec part[D][BATCH];
        for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) part[d][b] = zero();
        for (int64_t c = 0; c < columns; c += LANES, at += step) {
            _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);
            const Int code = unpack(codes + at, bytes - at);
            Vec x[BATCH];
            for (int b = 0; b < BATCH; ++b) x[b] = load(in.x + b * in.stride + g * l.group + c);
            for (int d = 0; d < D; ++d) {
                const Vec value = table[d].template at<REGISTERS>(code);
                for (int b = 0; b < BATCH; ++b) part[d][b] = fma(value, x[b], part[d][b]);
            }
        }
        for (int d = 0; d < D; ++d) {
            const Vec s = all(scale[d * l.groups + g]);
            for (int b = 0; b < BATCH; ++b) total[d][b] = fma(part[d][b], s, total[d][b]);
        }
    }
    for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) y[d * BATCH + b] = sum(total[d][b]);
}

// `D` rows of vector codes whose table is in memory: an entry is one load, as wide as a vector.
template <int D> struct Entry;
template <> struct Entry<2> {
    typedef __m128 T;
    static T get(const float *p) { return _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)); }
    static T all(float v) { return _mm_set1_ps(v); }
    static T none() { return _mm_setzero_ps(); }
    static T fma(T a, T b, T c) { return _mm_fmadd_ps(a, b, c); }
    static T add(T a, T b) { return _mm_add_ps(a, b); }
    static void put(float *p, T v) { _mm_storel_epi64((__m128i *)p, _mm_castps_si128(v)); }
};
template <> struct Entry<4> : Entry<2> {
    static T get(const float *p) { return _mm_loadu_ps(p); }
    static void put(float *p, T v) { _mm_storeu_ps(p, v); }
};
template <> struct Entry<8> {
    typedef __m256 T;
    static T get(const float *p) { return _mm256_loadu_ps(p); }
    static T all(float v) { return _mm256_set1_ps(v); }
    static T none() { return _mm256_setzero_ps(); }
    static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
    static T add(T a, T b) { return _mm256_add_ps(a, b); }
    static void put(float *p, T v) { _mm256_storeu_ps(p, v); }
};

template <int BATCH, int D> static void entry_rows(const Layer &l, int64_t v, const Unpack &unpack, const Input &in, const float *scale, float *y) {
    typedef Entry<D> E;
    typedef typename E::T T;
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = 4 * l.words, step = 2 * unpack.bits;
    float sums[BATCH][8] = {{0}};
    for (int64_t g = 0, at = 0; g < l.groups; ++g) {
        const int64_t columns = columns_under(l, g);
        const int CHAINS = BATCH == 1 ? 4 : 2;  // of additions: one would wait for itself
        T chain[CHAINS][BATCH];
        for (int k = 0; k < CHAINS; ++k) for (int b = 0; b < BATCH; ++b) chain[k][b] = E::none();
        for (int64_t c = 0; c < columns; c += LANES, at += step) {
            int32_t code[LANES];
            _mm_prefetch((const char *)(codes + at + AHEAD), _MM_HINT_T0);
            store(code, unpack(codes + at, bytes - at));
            const float *x = in.x + g * l.group + c;
            for (int i = 0; i < LANES; ++i) {
                const T entry = E::get(l.table + D * code[i]);
                for (int b = 0; b < BATCH; ++b) chain[i % CHAINS][b] = E::fma(entry, E::all(x[b * in.stride + i]), chain[i % CHAINS][b]);
            }
        }
        for (int b = 0; b < BATCH; ++b)
            for (int k = 1; k < CHAINS; ++k) chain[0][b] = E::add(chain[0][b], chain[k][b]);
        for (int b = 0; b < BATCH; ++b) {
            float part[8];
            E::put(part, chain[0][b]);
            for (int d = 0; d < D; ++d) sums[b][d] += part[d] * scale[d * l.groups + g];
        }
    }
    for (int d = 0; d < D; ++d) for (int b = 0; b < BATCH; ++b) y[d * BATCH + b] = sums[b][d];
}

// The base of the `dim` rows of vector v, fp32 [dim, stride], whatever the groups are.
static void decode_rows(const Layer &l, int64_t v, const Unpack &unpack, const float *scale, const float *shift, float *out, int64_t stride) {
    const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
    const int64_t bytes = 4 * l.words;
    for (int64_t c = 0; c < l.columns; c += LANES) {
        int32_t code[LANES];
        store(code, unpack(codes + c / LANES * 2 * unpack.bits, bytes - c / LANES * 2 * unpack.bits));
        for (int64_t i = 0; i < LANES && c + i < l.columns; ++i)
            for (int64_t d = 0; d < l.dim; ++d) out[d * stride + c + i] = l.table ? l.table[l.dim * code[i] + d] : (float)code[i];
    }
    for (int64_t d = 0; d < l.dim; ++d)
        for (int64_t g = 0; g < l.groups; ++g) {
            const int64_t end = (g + 1) * l.group < l.columns ? (g + 1) * l.group : l.columns;
            const float s = scale[d * l.groups + g], t = shift[d * l.groups + g];
            for (int64_t i = g * l.group; i < end; ++i) out[d * stride + i] = out[d * stride + i] * s + t;
        }
}

// One pass over the codes for BATCH inputs; y is [BATCH, rows].
template <int BATCH> static void pass(const Layer &l, const Input &in, const Table *tables, const float *lowrank, float *y) {
    const Unpack unpack(l.bits);
    const int64_t vectors = (l.rows + l.dim - 1) / l.dim, entries = l.table ? (int64_t)1 << l.bits : 0;
    const bool aligned = l.group % LANES == 0 || l.groups == 1;
#if defined(__AVX512VBMI__)
    const int registers = !aligned ? 0 : !entries ? -1 : entries <= 16 ? 1 : entries <= 32 ? 2 : entries <= 64 ? 4 : 8;
#else
    const int registers = !aligned ? 0 : !entries ? -1 : entries <= 16 ? 1 : 8;
#endif
#pragma omp parallel
    {
        float *scale = (float *)malloc(sizeof(float) * (size_t)(2 * l.dim * l.groups));
        float *shift = scale + l.dim * l.groups;
        float *row = registers == 0 ? (float *)calloc((size_t)(l.dim * in.stride), sizeof(float)) : 0;
        float out[8 * BATCH];
#pragma omp for schedule(static)
        for (int64_t v = 0; v < vectors; ++v) {
            const int64_t present = l.rows - v * l.dim < l.dim ? l.rows - v * l.dim : l.dim;
            memset(scale, 0, sizeof(float) * (size_t)(2 * l.dim * l.groups));
            for (int64_t d = 0; d < present; ++d) scales_of(l, v * l.dim + d, scale + d * l.groups, shift + d * l.groups);
            if (registers == 0) {
                decode_rows(l, v, unpack, scale, shift, row, in.stride);  // beyond the columns x is zero, and row at least finite
                for (int64_t d = 0; d < l.dim; ++d)
                    for (int b = 0; b < BATCH; ++b) {
                        Vec total = zero();
                        for (int64_t c = 0; c < l.columns; c += LANES) {
                            total = fma(load(row + d * in.stride + c), load(in.x + b * in.stride + c), total);
                        }
                        out[d * BATCH + b] = sum(total);
                    }
            } else if (l.dim == 1) {
                switch (registers) {
                    case -1: scalar_row<BATCH, -1>(l, v, unpack, tables[0], in, scale, shift, out); break;
                    case 1: scalar_row<BATCH, 1>(l, v, unpack, tables[0], in, scale, shift, out); break;
                    case 2: scalar_row<BATCH, 2>(l, v, unpack, tables[0], in, scale, shift, out); break;
                    case 4: scalar_row<BATCH, 4>(l, v, unpack, tables[0], in, scale, shift, out); break;
                    default: scalar_row<BATCH, 8>(l, v, unpack, tables[0], in, scale, shift, out);
                }
            } else if (l.dim == 2) {
                switch (registers) {
                    case 1: vector_rows<BATCH, 2, 1>(l, v, unpack, tables, in, scale, out); break;
                    case 2: vector_rows<BATCH, 2, 2>(l, v, unpack, tables, in, scale, out); break;
                    case 4: vector_rows<BATCH, 2, 4>(l, v, unpack, tables, in, scale, out); break;
                    default: entry_rows<BATCH, 2>(l, v, unpack, in, scale, out);
                }
            } else if (l.dim == 4) {
                entry_rows<BATCH, 4>(l, v, unpack, in, scale, out);
            } else {
                entry_rows<BATCH, 8>(l, v, unpack, in, scale, out);
            }
            for (int64_t d = 0; d < present; ++d) {
                const int64_t o = v * l.dim + d;
                for (int b = 0; b < BATCH; ++b) {
                    float value = out[d * BATCH + b];
                    for (int64_t r = 0; r < l.rank; ++r) {
                        const int64_t at = o * l.rank + r;
                        value += lowrank[b * l.rank + r] * (l.left_scale ? (float)((const int8_t *)l.left)[at] : wide(((const uint16_t *)l.left)[at]));
                    }
                    if (l.row_scale) value *= wide(l.row_scale[o]);
                    y[b * l.rows + o] = value + (l.bias ? wide(l.bias[o]) : 0.0f);
                }
            }
        }
        free(row);
        free(scale);
    }
}

// right @ x, scaled so that what is left to do is a sum over left's codes: [batch, rank].
static void lowrank_inputs(const Layer &l, const float *x, int64_t stride, int64_t batch, float *out) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < l.rank; ++r)
        for (int64_t b = 0; b < batch; ++b) {
            float total = 0;
            if (l.right_scale) {
                const int8_t *right = (const int8_t *)l.right + r * l.columns;
                for (int64_t i = 0; i < l.columns; ++i) total += (float)right[i] * x[b * stride + i];
                total *= wide(l.right_scale[r]) * wide(l.left_scale[r]);
            } else {
                const uint16_t *right = (const uint16_t *)l.right + r * l.columns;
                for (int64_t i = 0; i < l.columns; ++i) total += wide(right[i]) * x[b * stride + i];
            }
            out[b * l.rank + r] = total;
        }
}

extern "C" {

// y [batch, rows] of x [batch, stride], whose columns are padded with zeros to a multiple of sixteen.
void product(const Layer *layer, const float *x, int64_t stride, int64_t batch, float *y, int64_t threads) {
    const Layer &l = *layer;
    omp_set_num_threads((int)threads);
    const int64_t entries = l.table ? (int64_t)1 << l.bits : 0;
    float *sums = (float *)calloc((size_t)(batch * (l.groups + l.rank) + 1), sizeof(float)), *lowrank = sums + batch * l.groups;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t g = 0; g < l.groups; ++g) {
            float total = 0;
            for (int64_t i = g * l.group; i < (g + 1) * l.group && i < l.columns; ++i) total += x[b * stride + i];
            sums[b * l.groups + g] = total;
        }
    if (l.rank) lowrank_inputs(l, x, stride, batch, lowrank);
    float column[64];
    Table tables[2] = {Table(column, 0), Table(column, 0)};
    for (int64_t d = 0; d < l.dim && d < 2 && entries; ++d) {
        if (l.dim == 1) tables[0] = Table(l.table, entries);
        else if (entries <= 64) {
            for (int64_t k = 0; k < entries; ++k) column[k] = l.table[l.dim * k + d];
            tables[d] = Table(column, entries);
        }
    }
    for (int64_t b = 0; b < batch;) {
        const Input in = {x + b * stride, sums + b * l.groups, stride};
        const float *t = lowrank + b * l.rank;
        float *out = y + b * l.rows;
        const int64_t left = batch - b;
        if (left >= 8) pass<8>(l, in, tables, t, out), b += 8;
        else if (left >= 4) pass<4>(l, in, tables, t, out), b += 4;
        else if (left >= 2) pass<2>(l, in, tables, t, out), b += 2;
        else pass<1>(l, in, tables, t, out), b += 1;
    }
    free(sums);
}

// The base of rows [first, first + count), fp32 [count, columns]; `first` is a multiple of the vector length.
void decode(const Layer *layer, int64_t first, int64_t count, float *out, int64_t threads) {
    const Layer &l = *layer;
    omp_set_num_threads((int)threads);
    const Unpack unpack(l.bits);
#pragma omp parallel
    {
        float *scale = (float *)malloc(sizeof(float) * (size_t)(2 * l.dim * l.groups + l.dim * l.columns));
        float *shift = scale + l.dim * l.groups, *row = shift + l.dim * l.groups;
#pragma omp for schedule(static)
        for (int64_t v = first / l.dim; v < (first + count + l.dim - 1) / l.dim; ++v) {
            const int64_t end = first + count < (v + 1) * l.dim ? first + count - v * l.dim : l.dim;
            memset(scale, 0, sizeof(float) * (size_t)(2 * l.dim * l.groups));
            for (int64_t d = 0; d < end; ++d) scales_of(l, v * l.dim + d, scale + d * l.groups, shift + d * l.groups);
            decode_rows(l, v, unpack, scale, shift, row, l.columns);
            memcpy(out + (v * l.dim - first) * l.columns, row, sizeof(float) * (size_t)(end * l.columns));
        }
        free(scale);
    }
}

}  // extern "C"
