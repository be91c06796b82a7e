// y [n, rows] = x w^T of fp32 numbers, on a unit that multiplies tiles of 16-bit ones (AMX: bf16 times bf16, summed in fp32).
//
// A number of 24 bits is the sum of three bf16 numbers of 8 (high, middle, low), each what rounding the rest to bf16 gives, so that the sum is exact. A
// product of two such sums is nine products; the four of them that are below 2**-24 of the whole are left out, which is where fp32 rounds anyway. Weights
// that have fewer bits have fewer parts: bf16 ones are one, fp16 ones two, so that three or five products are left of the six. What there is, is seen when
// they are packed. Sums of every output are made in one order, whatever the number of inputs or threads.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EDGE 16     // rows of a tile, and fp32 columns of a tile of sums
#define DEPTH 32    // bf16 columns of a tile
#define BLOCK 32    // inputs, and rows of weights, whose sums are in registers at once: two tiles by two
#define PARTS 3
#define TILE (EDGE * DEPTH)
#define STEP (PARTS * 2 * TILE)  // numbers of a block that DEPTH columns are packed to: [part, half, 16, 32]
#define STEPS 4                  // of them between which sums leave the registers: inputs of so many fit the first-level cache, and are used for all rows
#define PANEL (1 << 19)          // weights, in all their parts, that the second-level cache holds for all inputs

typedef uint16_t bf16;

static int64_t blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }
static int64_t steps(int64_t columns) { return (columns + DEPTH - 1) / DEPTH; }

struct Parts {
    __m256i part[PARTS];
    explicit Parts(__m512 x) {
        for (int p = 0; p < PARTS; ++p) {
            part[p] = (__m256i)_mm512_cvtneps_pbh(x);
            x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part[p]), 16)));
        }
    }
};

// Sixteen columns from c on; those behind the last one are zero.
static __m512 sixteen(const float *row, int64_t c, int64_t columns) {
    const int64_t left = columns - c;
    return _mm512_maskz_loadu_ps((__mmask16)(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0), row + c);
}

// A block of inputs, row after row: [steps, part, half, 16, 32].
static void pack_inputs(const float *x, int64_t n, int64_t columns, bf16 *out) {
    for (int64_t s = 0; s < steps(columns); ++s)
        for (int64_t i = 0; i < BLOCK; ++i)
            for (int64_t c = 0; c < DEPTH; c += 16) {
                const Parts found(i < n ? sixteen(x + i * columns, s * DEPTH + c, columns) : _mm512_setzero_ps());
                for (int64_t p = 0; p < PARTS; ++p) _mm256_storeu_si256((__m256i *)(out + s * STEP + p * 2 * TILE + i * DEPTH + c), found.part[p]);
            }
}

// A block of rows of weights, pairs of columns one below the other: [steps, part, half, 16 pairs, 16 rows, 2]. Gives how many parts there are.
static int pack_weights(const float *w, int64_t rows, int64_t columns, bf16 *out) {
    const __m512i below = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(EDGE));
    __m512i any[PARTS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t s = 0; s < steps(columns); ++s)
        for (int64_t o = 0; o < BLOCK; ++o) {
            const float *row = w + o * columns;
            const __m512 zero = _mm512_setzero_ps();
            const Parts first(o < rows ? sixteen(row, s * DEPTH, columns) : zero), second(o < rows ? sixteen(row, s * DEPTH + 16, columns) : zero);
            for (int64_t p = 0; p < PARTS; ++p) {
                const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first.part[p]), second.part[p], 1);
                any[p] = _mm512_or_si512(any[p], both);
                _mm512_i32scatter_epi32((int *)(out + s * STEP + (p * 2 + o / EDGE) * TILE) + o % EDGE, below, both, 4);
            }
        }
    const __m512i size = _mm512_set1_epi16(0x7fff);
    return _mm512_test_epi16_mask(any[2], size) ? 3 : _mm512_test_epi16_mask(any[1], size) ? 2 : 1;
}

// Tiles: sums in 0 to 3 (two by two), weights in 4 and 5, inputs in 6 and 7. The intrinsics are statements.
#define WEIGHTS(p) { _tile_loadd(4, w + (p) * 2 * TILE, 64); _tile_loadd(5, w + ((p) * 2 + 1) * TILE, 64); }
#define INPUTS(p) { _tile_loadd(6, x + (p) * 2 * TILE, 64); _tile_loadd(7, x + ((p) * 2 + 1) * TILE, 64); }
#define MULTIPLY { _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5); }

// `sums` [2, 2, 16, 16] += a block of inputs times a block of weights, `count` steps of both. The first steps begin with nothing; the last ones end in y
// [32, 32], rows `stride` apart.
template <int WIDTH> static void block(const bf16 *x, const bf16 *w, int64_t count, bool first, float *sums, float *y, int64_t stride) {
    __asm__ volatile("" ::: "memory");  // tiles read what was written before, of which the compiler does not know
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64); _tile_loadd(1, sums + 256, 64); _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = 0; s < count; ++s, x += STEP, w += STEP) {
        WEIGHTS(0)
        INPUTS(2) MULTIPLY
        INPUTS(1) MULTIPLY
        if (WIDTH > 1) {
            WEIGHTS(1) MULTIPLY
            INPUTS(0) MULTIPLY
            if (WIDTH > 2) { WEIGHTS(2) MULTIPLY }
            WEIGHTS(0) MULTIPLY
        } else {
            INPUTS(0) MULTIPLY
        }
    }
    if (y) {
        const int64_t bytes = 4 * stride;
        _tile_stored(0, y, bytes); _tile_stored(1, y + EDGE, bytes); _tile_stored(2, y + EDGE * stride, bytes); _tile_stored(3, y + EDGE * stride + EDGE, bytes);
    } else {
        _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64); _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
    }
}

struct alignas(64) Tiles {
    uint8_t palette = 1, start = 0, reserved[14] = {0};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE, EDGE};
};
static const Tiles tiles;

// y [n, rows] of a block of n packed inputs and blocks of packed weights; `sums` is room for as many rows.
template <int WIDTH> static void times_panel(const bf16 *x, int64_t n, const bf16 *w, int64_t rows, int64_t columns, float *sums, float *y, int64_t stride) {
    alignas(64) float edge[BLOCK * BLOCK];
    const int64_t all = steps(columns);
    for (int64_t s = 0; s < all; s += STEPS) {
        const bool last = s + STEPS >= all;
        for (int64_t o = 0; o < rows; o += BLOCK) {
            const int64_t wide = rows - o < BLOCK ? rows - o : BLOCK;
            const bool whole = n == BLOCK && wide == BLOCK;
            block<WIDTH>(x + s * STEP, w + (o / BLOCK * all + s) * STEP, last ? all - s : STEPS, s == 0, sums + o * BLOCK, !last ? nullptr : whole ? y + o : edge, whole ? stride : BLOCK);
            if (last && !whole) for (int64_t i = 0; i < n; ++i) memcpy(y + i * stride + o, edge + i * BLOCK, sizeof(float) * (size_t)wide);
        }
    }
}

extern "C" {

// Whether the system lets this process have tiles, which it must be asked for (Linux: arch_prctl, ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
int64_t ready() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Numbers that `count` rows of inputs or weights are packed to.
int64_t packed(int64_t count, int64_t columns) { return blocks(count) * steps(columns) * STEP; }

void pack(const float *x, int64_t n, int64_t columns, bf16 *out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t b = 0; b < blocks(n); ++b) pack_inputs(x + b * BLOCK * columns, n - b * BLOCK, columns, out + b * steps(columns) * STEP);
}

// y [n, rows], rows `stride` apart, of packed inputs and weights [rows, columns]; `room` is for these, packed.
void multiply(const bf16 *x, int64_t n, int64_t columns, const float *w, int64_t rows, bf16 *room, float *y, int64_t stride, int64_t threads) {
    const int64_t each = steps(columns) * STEP;
    int width = 1;
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for reduction(max : width)
        for (int64_t b = 0; b < blocks(rows); ++b) {
            const int found = pack_weights(w + b * BLOCK * columns, rows - b * BLOCK, columns, room + b * each);
            width = found > width ? found : width;
        }
        const int64_t fitting = PANEL * PARTS / (width * each), panel = fitting > 0 ? fitting : 1, panels = (blocks(rows) + panel - 1) / panel;
        float *sums = (float *)aligned_alloc(64, sizeof(float) * (size_t)(panel * BLOCK * BLOCK));
        _tile_loadconfig(&tiles);
#pragma omp for collapse(2)
        for (int64_t p = 0; p < panels; ++p)
            for (int64_t b = 0; b < blocks(n); ++b) {
                const int64_t first = p * panel * BLOCK, count = rows - first < panel * BLOCK ? rows - first : panel * BLOCK;
                const int64_t inputs = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
                (width == 1 ? times_panel<1> : width == 2 ? times_panel<2> : times_panel<3>)(
                    x + b * each, inputs, room + p * panel * each, count, columns, sums, y + b * BLOCK * stride + first, stride);
            }
        _tile_release();
        free(sums);
    }
}

}  // extern "C"
