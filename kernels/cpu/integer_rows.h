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

// Codes of nine to fourteen bits of vectors of four rows. Two entries, loaded whole and interleaved, are two columns of four rows; eight make a
// register, whose lanes are pairs of columns of one row each, and inputs are spread to match. Four products at most are a sum of 32 bits.
struct Fours : Rows {
    template <int B> void some(int64_t v, int64_t b, const Tile &tile, const Int *spread) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        const int64_t bytes = 4 * l.words, bits = l.bits, step = 8 * bits, apart = in.blocks, stride = in.stride;
        const uint64_t mask = (1u << bits) - 1;
        const long long *table = (const long long *)l.fixed;
        const int16_t *x = in.words + b * stride;
        Vec total[B];
        UNROLL for (int k = 0; k < B; ++k) total[k] = zero();
        for (int64_t c = 0, at = 0; c < stride / BLOCK; ++c, at += step, x += BLOCK) {
            prefetch(codes + at + AHEAD, step);
            const WholeCodes whole(codes + at, bytes - at, bits);
            Vec part[B];
            UNROLL for (int k = 0; k < B; ++k) part[k] = zero();
            UNROLL for (int h = 0; h < 2; ++h) {
                __m512i pairs[B], dots[B];
                UNROLL for (int k = 0; k < B; ++k) pairs[k] = _mm512_loadu_si512(x + k * stride + 32 * h), dots[k] = _mm512_setzero_si512();
                UNROLL for (int e = 0; e < 4; ++e) {
                    __m256i eight[2];
                    UNROLL for (int f = 0; f < 2; ++f) {
                        const uint64_t four = whole.four(32 * h + 8 * e + 4 * f);
                        const __m128i first = _mm_unpacklo_epi16(_mm_cvtsi64_si128(table[four & mask]), _mm_cvtsi64_si128(table[four >> bits & mask]));
                        const __m128i then = _mm_unpacklo_epi16(_mm_cvtsi64_si128(table[four >> 2 * bits & mask]), _mm_cvtsi64_si128(table[four >> 3 * bits & mask]));
                        eight[f] = _mm256_inserti128_si256(_mm256_castsi128_si256(first), then, 1);
                    }
                    const __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(eight[0]), eight[1], 1);
                    UNROLL for (int k = 0; k < B; ++k) {
                        dots[k] = _mm512_dpwssd_epi32(dots[k], w, _mm512_permutexvar_epi32(spread[e], pairs[k]));
                        if (e % 2) part[k] = plus(part[k], number(dots[k])), dots[k] = _mm512_setzero_si512();
                    }
                }
            }
            UNROLL for (int k = 0; k < B; ++k) {
                const __m512 of_rows = _mm512_broadcast_f32x4(_mm_loadu_ps(tile.factor + (k * apart + c) * 4));
                total[k] = fma(part[k], of_rows, total[k]);
            }
        }
        UNROLL for (int k = 0; k < B; ++k) {
            float lanes[LANES];
            store(lanes, total[k]);
            for (int64_t d = 0; d < 4 && v * 4 + d < l.rows; ++d)
                finish(v * 4 + d, b + k, (float)l.fixed_step * (lanes[d] + lanes[4 + d] + lanes[8 + d] + lanes[12 + d]));
        }
    }

    // Factors of the four rows of a vector side by side, [B, blocks, 4].
    void factors(const Tile &tile, int64_t count, int64_t b) const {
        const int64_t blocks = in.stride / BLOCK;
        for (int64_t k = 0; k < count; ++k)
            for (int64_t c = 0, g = 0, next = l.group; c < blocks; ++c) {
                if (c * BLOCK >= next && g + 1 < l.groups) ++g, next += l.group;
                const float by = in.step[(b + k) * in.blocks + c];
                for (int d = 0; d < 4; ++d) tile.factor[(k * in.blocks + c) * 4 + d] = by * tile.scale[d * tile.each + g];
            }
    }
    void operator()(int64_t begin, int64_t end) const {
        Int spread[4];
        for (int e = 0; e < 4; ++e) spread[e] = lanes_of(e, 4);
        Tile tile(l, in, 2, arena);
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, tile.scale, tile.shift);
            int64_t b = 0;
            for (; b + 2 <= in.batch; b += 2) factors(tile, 2, b), some<2>(v, b, tile, spread);
            if (b < in.batch) factors(tile, 1, b), some<1>(v, b, tile, spread);
        }
    }
};

#endif
