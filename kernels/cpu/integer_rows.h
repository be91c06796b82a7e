// Rows multiplied as integers (octets.h). Part of rows.h.
//
// Where codes are numbers, four neighbours of them times their inputs are summed; where they are places in a table, two lookups give the bytes of
// sixteen-bit entries, which are. Then a conversion and a multiplication by the scale, for a lane of four (or two) columns.

#pragma once

// Of a few rows, as many as are multiplied in turn: what a block's sums are multiplied by ([rows, B, blocks], where blocks lie under one scale
// each) or the scales alone, and what the sums over lanes begin with. All of it is made before any row is multiplied: a vector that has just
// been written piece by piece is not read again without waiting.
#define TILE 8

struct Tile {
    float *scale, *shift, *factor, *start;
    int64_t each;

    Tile(const Layer &l, const Inputs &in, int64_t most_inputs, Arena &arena) : each(room(l)) {
        scale = arena.zeros<float>(TILE * each), shift = arena.zeros<float>(TILE * each);  // what is behind a row's own is multiplied with zeros
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
                for (int64_t g = 0; in.sums && g < each; g += LANES) sums = fma(load(shift + r * each + g), load(in.sums + (b + k) * each + g), sums);
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
template <bool EVEN, class Unpack = UnpackBytes> struct Bytes : Rows {
    template <int R, int B> void some(const Unpack &unpack, int64_t o, int64_t b, const Tile &tile, int64_t first) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + o * l.words);
        const int64_t bytes = 4 * l.words, present = codes_left(l, o), step = 8 * l.bits, blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const float *factor = tile.factor + first * B * apart, *steps = in.step + b * apart;
        float *start = tile.start + first * B * LANES;
        Vec total[R][B];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) total[r][k] = load(start + (r * B + k) * LANES);
        const int8_t *x = in.integers + b * stride;
        for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += 2 * BLOCK)
            UNROLL for (int r = 0; r < R; ++r) {
                _mm_prefetch((const char *)codes + r * bytes + at + AHEAD, _MM_HINT_T0);
                const auto code = unpack.numbers(codes + r * bytes + at, present - r * bytes - at);
                UNROLL for (int k = 0; k < B; ++k) {
                    if constexpr (EVEN) {
                        total[r][k] = added(total[r][k], code, x + k * stride, factor[(r * B + k) * apart + c]);
                    } else {
                        const Vec by = times(in.under(tile.scale + (first + r) * tile.each, c), all(steps[k * apart + c]));
                        total[r][k] = fma(number(dot(code, x + k * stride)), by, total[r][k]);
                    }
                }
            }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) store(start + (r * B + k) * LANES, total[r][k]);
    }

    template <int R, int B> void rows(const Unpack &unpack, int64_t o, int64_t count, int64_t b, Tile &tile) const {
        tile.make<B, EVEN>(l, in, count, b);
        int64_t r = 0;
        for (; r + R <= count; r += R) some<R, B>(unpack, o + r, b, tile, r);
        for (; r < count; ++r) some<1, B>(unpack, o + r, b, tile, r);
        sums_of(tile.start, TILE * B);
        for (r = 0; r < count; ++r) for (int k = 0; k < B; ++k) finish(o + r, b + k, tile.start[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        const Unpack unpack(l.bits, false);
        Tile tile(l, in, 4, arena);
        for (int64_t o = begin; o < end; o += TILE) {
            const int64_t count = end - o < TILE ? end - o : TILE;
            for (int64_t r = 0; r < count; ++r) scales_of(l, o + r, tile.scale + r * tile.each, tile.shift + r * tile.each);
            int64_t b = 0;
            for (; b + 4 <= in.batch; b += 4) rows<WIDE ? 4 : 1, 4>(unpack, o, count, b, tile);  // as many as there are registers for
            for (; b < in.batch; ++b) rows<1, 1>(unpack, o, count, b, tile);
        }
    }
};

// Codes of vectors of D rows in a table of SIZE fixed-point entries, B inputs at once.
template <int SIZE, int D, bool EVEN> struct Words : Rows {
    // The low and the high bytes of entries, for every row of a vector.
    struct Entry {
        Plane<SIZE> low, high;
        Pairs operator()(Octets code) const { return interleaved(low(code), high(code)); }
    };

    template <int B> void some(const UnpackBytes &unpack, const Entry *entry, int64_t v, int64_t b, const Tile &tile, int64_t first) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        const int64_t bytes = codes_left(l, v), step = 8 * l.bits, blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const float *factor = tile.factor + first * B * apart, *scale = tile.scale + first * tile.each, *steps = in.step + b * apart;
        const int8_t *x = in.integers + b * stride;
        Vec total[D][B];
        UNROLL for (int d = 0; d < D; ++d) UNROLL for (int k = 0; k < B; ++k) total[d][k] = zero();
        for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += 2 * BLOCK) {
            prefetch(codes + at + AHEAD, step);
            const Octets code = unpack(codes + at, bytes - at);
            UNROLL for (int d = 0; d < D; ++d) {
                const Pairs w = entry[d](code);
                UNROLL for (int k = 0; k < B; ++k) {
                    if (EVEN) {
                        total[d][k] = fma(number(dot(w, x + k * stride)), all(factor[(d * B + k) * apart + c]), total[d][k]);
                    } else {
                        Int of[PAIR_SUMS];
                        dots(w, x + k * stride, of);
                        Vec part = times(number(of[0]), in.under(scale + d * tile.each, PAIR_SUMS * c));
                        UNROLL for (int s = 1; s < PAIR_SUMS; ++s) part = fma(number(of[s]), in.under(scale + d * tile.each, PAIR_SUMS * c + s), part);
                        total[d][k] = fma(part, all(steps[k * apart + c]), total[d][k]);
                    }
                }
            }
        }
        UNROLL for (int d = 0; d < D; ++d) UNROLL for (int k = 0; k < B; ++k) store(tile.start + ((first + d) * B + k) * LANES, total[d][k]);
    }

    template <int B> void few(const UnpackBytes &unpack, const Entry *entry, int64_t v, int64_t count, int64_t b, Tile &tile) const {
        tile.make<B, EVEN>(l, in, count * D, b);
        for (int64_t i = 0; i < count; ++i) some<B>(unpack, entry, v + i, b, tile, i * D);
        sums_of(tile.start, TILE * B);
        for (int64_t r = 0; r < count * D && v * D + r < l.rows; ++r)
            for (int k = 0; k < B; ++k) finish(v * D + r, b + k, (float)l.fixed_step * tile.start[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        const UnpackBytes unpack(l.bits, true);
        Entry *entry = arena.take<Entry>(D);
        for (int64_t d = 0; d < D; ++d) new (entry + d) Entry{Plane<SIZE>(l.fixed + 2 * l.plane * d), Plane<SIZE>(l.fixed + 2 * l.plane * d + l.plane)};
        Tile tile(l, in, 2, arena);
        for (int64_t v = begin; v < end; v += TILE / D) {
            const int64_t count = end - v < TILE / D ? end - v : TILE / D;
            for (int64_t i = 0; i < count; ++i) load_scales(l, v + i, tile.scale + i * D * tile.each, tile.shift + i * D * tile.each);
            int64_t b = 0;
            for (; b + 2 <= in.batch; b += 2) few<2>(unpack, entry, v, count, b, tile);
            if (b < in.batch) few<1>(unpack, entry, v, count, b, tile);
        }
    }
};

// What a block's sums are multiplied by, of the D rows of a vector side by side, [count, blocks, D].
template <int D> static void row_factors(const Layer &l, const Inputs &in, const Tile &tile, int64_t count, int64_t b) {
    for (int64_t k = 0; k < count; ++k)
        for (int64_t c = 0, g = 0, next = l.group; c < in.stride / BLOCK; ++c) {
            if (c * BLOCK >= next && g + 1 < l.groups) ++g, next += l.group;
            const float by = in.step[(b + k) * in.blocks + c];
            for (int d = 0; d < D; ++d) tile.factor[(k * in.blocks + c) * D + d] = by * tile.scale[d * tile.each + g];
        }
}

#if WIDE

// Codes of nine to fourteen bits of vectors of four rows. Two entries, loaded whole and interleaved, are two columns of four rows; eight make a
// register, whose lanes are pairs of columns of one row each, and inputs are spread to match. Four products at most are a sum of 32 bits.
// BITS, where they are known in advance, make places of codes constants: a tenth of the time.
template <int D, int BITS> struct Loaded : Rows {
    static_assert(D == 4, "a register is eight entries of four rows");

    template <int B> void some(int64_t v, int64_t b, const Tile &tile, const Int *spread) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        const int64_t bytes = codes_left(l, v), bits = BITS ? BITS : l.bits, step = 8 * bits, apart = in.blocks, stride = in.stride;
        const uint64_t mask = (1u << bits) - 1;
        const long long *table = (const long long *)l.entries;
        const int16_t *x = (const int16_t *)in.integers + b * stride;
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

    void operator()(int64_t begin, int64_t end) const {
        Int spread[4];
        for (int e = 0; e < 4; ++e) spread[e] = lanes_of(e, 4);
        Tile tile(l, in, 2, arena);
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, tile.scale, tile.shift);
            int64_t b = 0;
            for (; b + 2 <= in.batch; b += 2) row_factors<4>(l, in, tile, 2, b), some<2>(v, b, tile, spread);
            if (b < in.batch) row_factors<4>(l, in, tile, 1, b), some<1>(v, b, tile, spread);
        }
    }
};

#else

// Codes of seven to fourteen bits of vectors of D rows, four or eight. Entries are loaded whole; two of even (or odd) columns interleaved are pairs
// of columns, one of every row, which are multiplied with the same pair of inputs. Four products at most are a sum of 32 bits.
template <int D, int BITS> struct Loaded : Rows {
    static __m128i entry(const int16_t *table, uint64_t at) {
        return D == 4 ? _mm_loadl_epi64((const __m128i *)(table + 4 * at)) : _mm_loadu_si128((const __m128i *)(table + 8 * at));
    }
    static __m256i both(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

    // Of eight codes (four of vectors of eight rows): pairs of even columns, and of odd ones.
    static void pairs(const int16_t *table, const WholeCodes &whole, int64_t first, __m256i *even, __m256i *odd) {
        const uint64_t mask = (1u << whole.bits) - 1, four = whole.four(first);
        __m128i e[8];
        UNROLL for (int k = 0; k < 4; ++k) e[k] = entry(table, four >> k * whole.bits & mask);
        if (D == 4) {
            const uint64_t next = whole.four(first + 4);
            UNROLL for (int k = 0; k < 4; ++k) e[4 + k] = entry(table, next >> k * whole.bits & mask);
            *even = both(_mm_unpacklo_epi16(e[0], e[2]), _mm_unpacklo_epi16(e[4], e[6])), *odd = both(_mm_unpacklo_epi16(e[1], e[3]), _mm_unpacklo_epi16(e[5], e[7]));
        } else {
            *even = both(_mm_unpacklo_epi16(e[0], e[2]), _mm_unpackhi_epi16(e[0], e[2])), *odd = both(_mm_unpacklo_epi16(e[1], e[3]), _mm_unpackhi_epi16(e[1], e[3]));
        }
    }
    // The inputs of such pairs, from their first on.
    static __m256i spread(const int16_t *x) {
        int64_t two;
        int32_t one;
        memcpy(&two, x, 8), memcpy(&one, x, 4);
        if (D == 8) return _mm256_set1_epi32(one);
        const __m256i each = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
        return _mm256_shuffle_epi8(_mm256_set1_epi64x(two), each);
    }

    template <int B> void some(int64_t v, int64_t b, const Tile &tile) const {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        const int64_t bytes = codes_left(l, v), bits = BITS ? BITS : l.bits, step = 8 * bits, apart = in.blocks, stride = in.stride;
        const int16_t *x = (const int16_t *)in.integers + b * stride;
        __m256 total[B];
        UNROLL for (int k = 0; k < B; ++k) total[k] = _mm256_setzero_ps();
        for (int64_t c = 0, at = 0; c < stride / BLOCK; ++c, at += step, x += BLOCK) {
            prefetch(codes + at + AHEAD, step);
            const WholeCodes whole(codes + at, bytes - at, bits);
            __m256 part[B];
            UNROLL for (int k = 0; k < B; ++k) part[k] = _mm256_setzero_ps();
            const int EACH = 32 / D;  // columns at once
            for (int first = 0; first < BLOCK; first += EACH) {
                __m256i even, odd;
                pairs(l.entries, whole, first, &even, &odd);
                const int16_t *of = x + first / 32 * 32 + first % 32 / 2;
                UNROLL for (int k = 0; k < B; ++k) {
                    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even, spread(of + k * stride)), _mm256_madd_epi16(odd, spread(of + k * stride + 16)));
                    part[k] = _mm256_add_ps(part[k], _mm256_cvtepi32_ps(sum));
                }
            }
            UNROLL for (int k = 0; k < B; ++k) {
                const float *factor = tile.factor + (k * apart + c) * D;
                total[k] = _mm256_fmadd_ps(part[k], D == 8 ? _mm256_loadu_ps(factor) : _mm256_broadcast_ps((const __m128 *)factor), total[k]);
            }
        }
        UNROLL for (int k = 0; k < B; ++k) {
            float lanes[8];
            _mm256_storeu_ps(lanes, total[k]);
            for (int64_t d = 0; d < D && v * D + d < l.rows; ++d) finish(v * D + d, b + k, (float)l.fixed_step * (D == 8 ? lanes[d] : lanes[d] + lanes[4 + d]));
        }
    }

    void operator()(int64_t begin, int64_t end) const {
        Tile tile(l, in, 2, arena);
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, tile.scale, tile.shift);
            int64_t b = 0;
            for (; b + 2 <= in.batch; b += 2) row_factors<D>(l, in, tile, 2, b), some<2>(v, b, tile);
            if (b < in.batch) row_factors<D>(l, in, tile, 1, b), some<1>(v, b, tile);
        }
    }
};

#endif
