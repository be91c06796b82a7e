// Rows multiplied as integers (AVX-512 with VBMI and VNNI). Part of rows.h.
//
// Sixty-four codes are a register of bytes. Where they are numbers, four neighbours of them times the high bytes of their inputs are summed in
// one instruction, and times the low bytes in another. Where they are places in a table, two lookups give the bytes of sixteen-bit entries, and
// two neighbours times two inputs are summed at once. Then a conversion and a multiplication by the scale, for a lane of four or two columns.

#pragma once

#if PLANES

// Of a few rows, as many as are multiplied in turn: what a block's sums are multiplied by ([rows, B, blocks], where blocks lie under one scale
// each) or the scales alone, and what the sums over lanes begin with. All of it is made before any row is multiplied: a vector that has just
// been written piece by piece is not read again without waiting.
#define TILE 8

struct Tile {
    float *scale, *shift, *factor, *start;
    int64_t each;

    Tile(const Layer &l, const Inputs &in, int64_t most_inputs, Arena &arena) : each(room(l)) {
        scale = arena.take<float>(TILE * each), shift = arena.take<float>(TILE * each);
        factor = arena.take<float>(TILE * most_inputs * in.blocks), start = arena.take<float>(TILE * most_inputs * LANES);
    }
    // `count` rows from the scales of the first on, times inputs b to b + B - 1.
    template <int B, bool EVEN> void make(const Layer &l, const Inputs &in, int64_t count, int64_t b) {
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t v = 0; EVEN && v < in.blocks / LANES; ++v) {
                const Vec of_block = in.under(scale + r * each, v);
                for (int k = 0; k < B; ++k) store(factor + (r * B + k) * in.blocks + v * LANES, times(of_block, load(in.step + (b + k) * in.blocks + v * LANES)));
            }
            for (int k = 0; k < B; ++k) {
                Vec sums = zero();
                const float *shift = has_shift(l) ? this->shift : scale;  // a centre is in the sums
                for (int64_t g = 0; in.sums && g < l.groups; g += LANES) sums = fma(load(shift + r * each + g, l.groups - g), load(in.sums + (b + k) * l.groups + g, l.groups - g), sums);
                store(start + (r * B + k) * LANES, sums);
            }
        }
    }
};

// Sums over lanes of `count` vectors, which are overwritten.
static void sums_of(float *vectors, int64_t count) {
    for (int64_t i = 0; i < count; i += 4) {
        Vec v[4];
        for (int k = 0; k < 4; ++k) v[k] = load(vectors + (i + k) * LANES);
        sums(v, vectors + i);
    }
}

// Codes that are numbers. One input goes with one row at a time: a stream of bytes is read at twice the speed of four; four inputs with four.
template <bool EVEN> struct Bytes : Rows {
    template <int R, int B> void some(const UnpackBytes &unpack, int64_t o, int64_t b, const Tile &tile, int64_t first) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + o * l.words);
        const int64_t bytes = 4 * l.words, step = 8 * l.bits, blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const float *factor = tile.factor + first * B * apart, *steps = in.step + b * apart;
        float *start = tile.start + first * B * LANES;
        Vec total[R][B];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) total[r][k] = load(start + (r * B + k) * LANES);
        const int8_t *x = in.bytes + b * stride;
        for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += 2 * BLOCK) {
            const __mmask64 present = unpack.bytes(bytes - at);
            __m512i high[B], low[B];
            UNROLL for (int k = 0; k < B; ++k) high[k] = _mm512_loadu_si512(x + k * stride), low[k] = _mm512_loadu_si512(x + k * stride + BLOCK);
            UNROLL for (int r = 0; r < R; ++r) {
                _mm_prefetch((const char *)codes + r * bytes + at + AHEAD, _MM_HINT_T0);
                const __m512i code = unpack.alone(codes + r * bytes + at, present);
                UNROLL for (int k = 0; k < B; ++k) {
                    __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), code, high[k]);
                    dots = _mm512_dpbusd_epi32(_mm512_slli_epi32(dots, 8), code, low[k]);
                    const Vec by = EVEN ? all(factor[(r * B + k) * apart + c]) : times(in.under(tile.scale + (first + r) * tile.each, c), all(steps[k * apart + c]));
                    total[r][k] = fma(number(dots), by, total[r][k]);
                }
            }
        }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) store(start + (r * B + k) * LANES, total[r][k]);
    }

    template <int R, int B> void rows(const UnpackBytes &unpack, int64_t o, int64_t count, int64_t b, Tile &tile) const {
        tile.make<B, EVEN>(l, in, count, b);
        int64_t r = 0;
        for (; r + R <= count; r += R) some<R, B>(unpack, o + r, b, tile, r);
        for (; r < count; ++r) some<1, B>(unpack, o + r, b, tile, r);
        sums_of(tile.start, TILE * B);
        for (r = 0; r < count; ++r) for (int k = 0; k < B; ++k) finish(o + r, b + k, tile.start[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        const UnpackBytes unpack(l.bits, false);
        Tile tile(l, in, 4, arena);
        for (int64_t o = begin; o < end; o += TILE) {
            const int64_t count = end - o < TILE ? end - o : TILE;
            for (int64_t r = 0; r < count; ++r) scales_of(l, o + r, tile.scale + r * tile.each, tile.shift + r * tile.each);
            int64_t b = 0;
            for (; b + 4 <= in.batch; b += 4) rows<4, 4>(unpack, o, count, b, tile);
            for (; b < in.batch; ++b) rows<1, 1>(unpack, o, count, b, tile);
        }
    }
};

// Codes of vectors of D rows in a table of SIZE fixed-point entries, B inputs at once.
template <int SIZE, int D, bool EVEN> struct Words : Rows {
    template <int B> void some(const UnpackBytes &unpack, int64_t v, int64_t b, const Tile &tile, int64_t first) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words), *table = l.fixed;
        const int64_t bytes = 4 * l.words, step = 8 * l.bits, blocks = in.stride / BLOCK, apart = in.blocks, stride = in.stride;
        const float *factor = tile.factor + first * B * apart, *scale = tile.scale + first * tile.each, *steps = in.step + b * apart;
        const int16_t *x = in.words + b * stride;
        Vec total[D][B];
        UNROLL for (int d = 0; d < D; ++d) UNROLL for (int k = 0; k < B; ++k) total[d][k] = zero();
        for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += BLOCK) {
            prefetch(codes + at + AHEAD, step);
            const Octets code = unpack(codes + at, unpack.bytes(bytes - at));
            __m512i early[B], late[B];
            UNROLL for (int k = 0; k < B; ++k) early[k] = _mm512_loadu_si512(x + k * stride), late[k] = _mm512_loadu_si512(x + k * stride + 32);
            UNROLL for (int d = 0; d < D; ++d) {
                const __m512i low = plane<SIZE>(table + 2 * SIZE * d, code), high = plane<SIZE>(table + 2 * SIZE * d + SIZE, code);
                const __m512i a = _mm512_unpacklo_epi8(low, high), z = _mm512_unpackhi_epi8(low, high);
                UNROLL for (int k = 0; k < B; ++k) {
                    const __m512i dots = _mm512_dpwssd_epi32(_mm512_setzero_si512(), a, early[k]);
                    if (EVEN) {
                        total[d][k] = fma(number(_mm512_dpwssd_epi32(dots, z, late[k])), all(factor[(d * B + k) * apart + c]), total[d][k]);
                    } else {
                        const Vec later = number(_mm512_dpwssd_epi32(_mm512_setzero_si512(), z, late[k]));
                        const Vec part = fma(later, in.under(scale + d * tile.each, 2 * c + 1), times(number(dots), in.under(scale + d * tile.each, 2 * c)));
                        total[d][k] = fma(part, all(steps[k * apart + c]), total[d][k]);
                    }
                }
            }
        }
        UNROLL for (int d = 0; d < D; ++d) UNROLL for (int k = 0; k < B; ++k) store(tile.start + ((first + d) * B + k) * LANES, total[d][k]);
    }

    template <int B> void few(const UnpackBytes &unpack, int64_t v, int64_t count, int64_t b, Tile &tile) const {
        tile.make<B, EVEN>(l, in, count * D, b);
        for (int64_t i = 0; i < count; ++i) some<B>(unpack, v + i, b, tile, i * D);
        sums_of(tile.start, TILE * B);
        for (int64_t r = 0; r < count * D && v * D + r < l.rows; ++r)
            for (int k = 0; k < B; ++k) finish(v * D + r, b + k, (float)l.fixed_step * tile.start[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        const UnpackBytes unpack(l.bits, true);
        Tile tile(l, in, 2, arena);
        for (int64_t v = begin; v < end; v += TILE / D) {
            const int64_t count = end - v < TILE / D ? end - v : TILE / D;
            for (int64_t i = 0; i < count; ++i) load_scales(l, v + i, tile.scale + i * D * tile.each, tile.shift + i * D * tile.each);
            int64_t b = 0;
            for (; b + 2 <= in.batch; b += 2) few<2>(unpack, v, count, b, tile);
            if (b < in.batch) few<1>(unpack, v, count, b, tile);
        }
    }
};

#endif
