// y [n, rows] = x w^T of fp32 numbers, on a unit that multiplies tiles of 16-bit ones (AMX: bf16 times bf16, summed in fp32).
//
// A number of 24 bits is the sum of three bf16 numbers of 8 (high, middle, low), each what rounding the rest to bf16 gives, so that the sum is exact. A
// product of two such sums is nine products; those that are below 2**-24 of the whole, where fp32 rounds anyway, are left out, which leaves six. Weights of
// fewer bits have fewer parts: bf16 ones are one, fp16 ones two, so that three or five products are left. How many there are is seen before they are packed.
// Sums of every output are made in one order, whatever the number of inputs or threads.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EDGE 16   // rows of a tile, and fp32 columns of a tile of sums
#define DEPTH 32  // bf16 columns of a tile
#define BLOCK 32  // inputs, and rows of weights, whose sums are in registers at once: two tiles by two
#define PARTS 3   // of an input
#define TILE (EDGE * DEPTH)
#define PAIR (2 * TILE)    // what DEPTH columns of a block are packed to, for each of its parts: [2, 16, 32]
#define STEPS 6            // of DEPTH columns between which sums leave the registers: inputs of so many stay in the first-level cache for all rows
#define PANEL (1 << 19)    // numbers that weights are packed to and that stay in the second-level cache for all inputs

typedef uint16_t bf16;

static int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }
static int64_t steps(int64_t columns) { return (columns + DEPTH - 1) / DEPTH; }
static int64_t packed_block(int64_t columns, int64_t parts) { return steps(columns) * parts * PAIR; }

static __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Sixteen columns from c on; those behind the last one are zero.
static __m512 sixteen(const float *row, int64_t c, int64_t columns) {
    const int64_t left = columns - c;
    return _mm512_maskz_loadu_ps((__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0), row + c);
}

// The next part of sixteen numbers, which are left with the rest.
static __m256i next_part(__m512 &x) {
    const __m256i part = rounded(x);
    x = _mm512_sub_ps(x, widened(part));
    return part;
}

// A block of at most 32 inputs, row after row: [steps, part, 32, 32].
static void pack_inputs(const float *x, int64_t n, int64_t columns, bf16 *out) {
    for (int64_t s = 0; s < steps(columns); ++s)
        for (int64_t i = 0; i < BLOCK; ++i)
            for (int64_t c = 0; c < DEPTH; c += 16) {
                __m512 rest = i < n ? sixteen(x + i * columns, s * DEPTH + c, columns) : _mm512_setzero_ps();
                for (int64_t p = 0; p < PARTS; ++p) _mm256_storeu_si256((__m256i *)(out + (s * PARTS + p) * PAIR + i * DEPTH + c), next_part(rest));
            }
}

// How many parts numbers have: 1 to 3.
static int parts_of(const float *w, int64_t count) {
    __m512 second = _mm512_setzero_ps(), third = second;
    for (int64_t c = 0; c < count; c += 16) {
        __m512 rest = sixteen(w, c, count);
        next_part(rest);
        second = _mm512_or_ps(second, rest);
        next_part(rest);
        third = _mm512_or_ps(third, rest);
    }
    const __m512 none = _mm512_setzero_ps();  // of either sign
    return _mm512_cmp_ps_mask(third, none, _CMP_NEQ_UQ) ? 3 : _mm512_cmp_ps_mask(second, none, _CMP_NEQ_UQ) ? 2 : 1;
}

// Sixteen rows of sixteen pairs of numbers, pairs below each other instead.
static void transpose(__m512i *r) {
    __m512i t[EDGE];
    for (int i = 0; i < EDGE; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < EDGE; i += 4)
        for (int k = 0; k < 2; ++k) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + 2 + k]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + 2 + k]);
        }
    for (int i = 0; i < EDGE; i += 8)
        for (int k = 0; k < 4; ++k) {
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0x88);
            t[i + 4 + k] = _mm512_shuffle_i32x4(r[i + k], r[i + 4 + k], 0xdd);
        }
    for (int k = 0; k < 8; ++k) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88);
        r[8 + k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0xdd);
    }
}

// A block of at most 32 rows of weights, pairs of columns below each other: [steps, part, half, 16 pairs, 16 rows, 2].
static void pack_weights(const float *w, int64_t rows, int64_t columns, int parts, bf16 *out) {
    for (int64_t s = 0; s < steps(columns); ++s)
        for (int64_t half = 0; half < 2; ++half) {
            __m512i part[PARTS][EDGE];
            for (int64_t o = 0; o < EDGE; ++o) {
                const float *row = w + (half * EDGE + o) * columns;
                const bool there = half * EDGE + o < rows;
                __m512 first = there ? sixteen(row, s * DEPTH, columns) : _mm512_setzero_ps(), second = there ? sixteen(row, s * DEPTH + 16, columns) : first;
                for (int p = 0; p < parts; ++p) {
                    const __m256i low = next_part(first);
                    part[p][o] = _mm512_inserti64x4(_mm512_castsi256_si512(low), next_part(second), 1);
                }
            }
            for (int p = 0; p < parts; ++p) {
                transpose(part[p]);
                for (int64_t k = 0; k < EDGE; ++k) _mm512_storeu_si512(out + (s * parts + p) * PAIR + half * TILE + k * DEPTH, part[p][k]);
            }
        }
}

// Tiles: sums in 0 to 3 (two by two), weights in 4 and 5, inputs in 6 and 7. The intrinsics are statements.
#define WEIGHTS(p) { _tile_loadd(4, w + (p) * PAIR, 64); _tile_loadd(5, w + (p) * PAIR + TILE, 64); }
#define INPUTS(p) { _tile_loadd(6, x + (p) * PAIR, 64); _tile_loadd(7, x + (p) * PAIR + TILE, 64); }
#define MULTIPLY { _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5); }

// `sums` [2, 2, 16, 16] += a block of inputs times a block of weights of P parts, `count` steps of both. The first steps begin with nothing; the last ones
// end in y [32, 32], rows `stride` apart (null: they are not the last).
template <int P> static void times_block(const bf16 *x, const bf16 *w, int64_t count, bool first, float *sums, float *y, int64_t stride) {
    __asm__ volatile("" ::: "memory");  // tiles read what was written before, of which the compiler does not know
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64); _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = 0; s < count; ++s, x += PARTS * PAIR, w += P * PAIR) {
        WEIGHTS(0)
        INPUTS(2) MULTIPLY
        INPUTS(1) MULTIPLY
        if (P > 1) {
            WEIGHTS(1) MULTIPLY
            INPUTS(0) MULTIPLY
            if (P > 2) { WEIGHTS(2) MULTIPLY }
            WEIGHTS(0) MULTIPLY
        } else {
            INPUTS(0) MULTIPLY
        }
    }
    if (y) {
        const int64_t bytes = 4 * stride;
        float *below = y + EDGE * stride;
        _tile_stored(0, y, bytes); _tile_stored(1, y + EDGE, bytes); _tile_stored(2, below, bytes); _tile_stored(3, below + EDGE, bytes);
    } else {
        _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64); _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
    }
}

// y [n, rows] of a block of n packed inputs and of blocks of packed weights; `sums` is room for all of them.
template <int P> static void times_panel(const bf16 *x, int64_t n, const bf16 *w, int64_t rows, int64_t columns, float *sums, float *y, int64_t stride) {
    alignas(64) float edge[BLOCK * BLOCK];
    const int64_t all = steps(columns);
    for (int64_t s = 0; s < all; s += STEPS) {
        const bool last = s + STEPS >= all;
        for (int64_t o = 0; o < rows; o += BLOCK) {
            const int64_t wide = rows - o < BLOCK ? rows - o : BLOCK;
            const bool whole = n == BLOCK && wide == BLOCK;
            float *out = !last ? nullptr : whole ? y + o : edge;
            times_block<P>(x + s * PARTS * PAIR, w + (o / BLOCK * all + s) * P * PAIR, last ? all - s : STEPS, s == 0, sums + o * BLOCK, out, whole ? stride : BLOCK);
            if (last && !whole) for (int64_t i = 0; i < n; ++i) memcpy(y + i * stride + o, edge + i * BLOCK, sizeof(float) * (size_t)wide);
        }
    }
}

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {0};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE};
};
static const Tiles tiles;

extern "C" {

// Whether the system lets this process have tiles, which it must be asked for (Linux: arch_prctl, ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
int64_t ready() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Numbers that `count` rows are packed to.
int64_t packed(int64_t count, int64_t columns, int64_t parts) { return blocks(count) * packed_block(columns, parts); }

// Inputs [n, columns], in three parts.
void pack_all_inputs(const float *x, int64_t n, int64_t columns, bf16 *out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t b = 0; b < blocks(n); ++b) pack_inputs(x + b * BLOCK * columns, n - b * BLOCK, columns, out + b * packed_block(columns, PARTS));
}

// In how many parts weights [rows, columns] must be packed.
int64_t count_parts(const float *w, int64_t rows, int64_t columns, int64_t threads) {
    int parts = 1;
#pragma omp parallel for num_threads((int)threads) reduction(max : parts)
    for (int64_t o = 0; o < rows; ++o) {
        const int found = parts_of(w + o * columns, columns);
        parts = found > parts ? found : parts;
    }
    return parts;
}

void pack_all_weights(const float *w, int64_t rows, int64_t columns, int64_t parts, bf16 *out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t b = 0; b < blocks(rows); ++b) pack_weights(w + b * BLOCK * columns, rows - b * BLOCK, columns, (int)parts, out + b * packed_block(columns, parts));
}

// y [n, rows], rows `stride` apart, of packed inputs and packed weights.
void multiply(const bf16 *x, int64_t n, int64_t columns, const bf16 *w, int64_t parts, int64_t rows, float *y, int64_t stride, int64_t threads) {
    const int64_t each = packed_block(columns, parts), fitting = PANEL / each, panel = BLOCK * (fitting > 0 ? fitting : 1), panels = (rows + panel - 1) / panel;
#pragma omp parallel num_threads((int)threads)
    {
        float *sums = (float *)aligned_alloc(64, sizeof(float) * (size_t)(panel * BLOCK));
        _tile_loadconfig(&tiles);
#pragma omp for collapse(2)
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t b = 0; b < blocks(n); ++b) {
                const int64_t first = p * panel, count = rows - first < panel ? rows - first : panel, inputs = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
                (parts == 1 ? times_panel<1> : parts == 2 ? times_panel<2> : times_panel<3>)(
                    x + b * packed_block(columns, PARTS), inputs, w + first / BLOCK * each, count, columns, sums, y + b * BLOCK * stride + first, stride);
            }
        _tile_release();
        free(sums);
    }
}

}  // extern "C"
