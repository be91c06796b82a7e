// Rows of trellis codes (kernels/formats/trellis.py). Part of rows.h.
//
// A code and those above it are a window of bits, so a row is decoded behind the row before it: the window of every column is kept, shifted by a
// code for every row, multiplied, and the high byte of the product looked up among 256 levels. A row is decoded to bytes, which stay in the
// first-level cache, and multiplied as codes that are numbers are.

#pragma once

#if WIDE
// The number at each of sixty-four places among 256.
struct Levels {
    __m512i table[4], odd;
    explicit Levels(const uint8_t *levels) {
        uint8_t high[64];
        for (int k = 0; k < 64; ++k) high[k] = (uint8_t)(2 * k + 1);
        odd = _mm512_loadu_si512(high);
        for (int k = 0; k < 4; ++k) table[k] = _mm512_loadu_si512(levels + 64 * k);
    }
    __m512i high_bytes(__m512i early, __m512i late) const { return _mm512_permutex2var_epi8(early, odd, late); }
    __m512i operator()(__m512i place) const {
        const __m512i low = _mm512_permutex2var_epi8(table[0], place, table[1]), high = _mm512_permutex2var_epi8(table[2], place, table[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(place), low, high);
    }
};
#else
// The number at each of thirty-two places among 256, of which the lower half mirrors the upper one.
struct Levels {
    Plane<128> upper;
    explicit Levels(const uint8_t *levels) : upper(levels + 128) {}
    __m256i operator()(__m256i place) const {
        const __m256i above = _mm256_xor_si256(place, _mm256_set1_epi8((char)0x80)), below = _mm256_cmpgt_epi8(_mm256_setzero_si256(), above);
        const __m256i found = Plane<128>::from<8>(upper.part, _mm256_xor_si256(above, below));
        return _mm256_sub_epi8(_mm256_xor_si256(found, below), below);  // 256 less it
    }
};
#endif

// Decodes rows one after the other, to levels [dim, stride] as numbers of 0 to 255 around 128.
class Path {
    const Layer &l;
    const int64_t stride, step;
    uint16_t *state;  // of a block's columns in the order of its words
    const uint16_t kept;
    const UnpackBytes unpack;
    const Levels level;

    // Windows of all columns move on by the codes of `count` vectors from v on, and with D > 0 give the levels of D rows for each.
    template <int D> void pass(int64_t v, int64_t count, uint8_t *out) {
        const int64_t bytes = codes_left(l, v), apart = 4 * l.words, stride = this->stride, step = this->step;
        const UnpackBytes unpack = this->unpack;  // copies: what is written below might be these, for all that the compiler knows
        const Levels level = this->level;
        uint16_t *const state = this->state;
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
#if WIDE
        const __m512i mask = _mm512_set1_epi16((short)kept), multiplier[2] = {_mm512_set1_epi16((short)l.first), _mm512_set1_epi16((short)l.second)};
        const unsigned bits = (unsigned)l.bits;
        for (int64_t i = 0; i < count; ++i, codes += apart)
            for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
                prefetch(codes + at + AHEAD, step);
                const __m512i code = unpack.numbers(codes + at, unpack.bytes(bytes - i * apart - at));
                __m512i now[2];
                UNROLL for (int h = 0; h < 2; ++h) {
                    const __m512i added = _mm512_cvtepu8_epi16(h ? _mm512_extracti64x4_epi64(code, 1) : _mm512_castsi512_si256(code));
                    now[h] = _mm512_or_si512(_mm512_slli_epi16(_mm512_loadu_si512(state + c + 32 * h), bits), added);
                    _mm512_storeu_si512(state + c + 32 * h, now[h]);
                    now[h] = _mm512_and_si512(now[h], mask);
                }
                UNROLL for (int d = 0; d < D; ++d)
                    _mm512_storeu_si512(out + (i * D + d) * stride + c, level(level.high_bytes(_mm512_mullo_epi16(now[0], multiplier[d]), _mm512_mullo_epi16(now[1], multiplier[d]))));
            }
#else
        // A block after the other, for all vectors: so windows stay in registers.
        const __m256i mask = _mm256_set1_epi16((short)kept), high = _mm256_set1_epi16((short)0xff00);
        const __m256i multiplier[2] = {_mm256_set1_epi16((short)l.first), _mm256_set1_epi16((short)l.second)};
        const __m128i bits = _mm_cvtsi64_si128(l.bits);
        uint8_t copy[TILE][COPIED];
        const uint8_t *from[TILE];
        for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
            for (int64_t i = 0; i < count; ++i) prefetch(codes + i * apart + at + AHEAD / 8, step), from[i] = readable(codes + i * apart + at, bytes - i * apart - at, unpack.reach, step, copy[i]);
            for (int h = 0; h < 2; ++h) {
                __m256i *kept_even = (__m256i *)(state + c) + 2 * h, *kept_odd = kept_even + 1, even = *kept_even, odd = *kept_odd;
                for (int64_t i = 0; i < count; ++i) {
                    __m256i even_code, odd_code;
                    unpack.half(from[i], h, &even_code, &odd_code);
                    even = _mm256_or_si256(_mm256_sll_epi16(even, bits), even_code), odd = _mm256_or_si256(_mm256_sll_epi16(odd, bits), odd_code);
                    UNROLL for (int d = 0; d < D; ++d) {
                        const __m256i early = _mm256_mullo_epi16(_mm256_and_si256(even, mask), multiplier[d]), late = _mm256_mullo_epi16(_mm256_and_si256(odd, mask), multiplier[d]);
                        const __m256i place = _mm256_or_si256(_mm256_srli_epi16(early, 8), _mm256_and_si256(late, high));
                        _mm256_storeu_si256((__m256i *)(out + (i * D + d) * stride + c) + h, level(place));
                    }
                }
                *kept_even = even, *kept_odd = odd;
            }
        }
#endif
    }

  public:
    // In front of vector v.
    Path(const Layer &l, int64_t v, Arena &arena)
        : l(l), stride(padded(l.columns)), step(8 * l.bits), state(arena.zeros<uint16_t>(padded(l.columns))), kept((uint16_t)((1u << l.window) - 1)), unpack(l.bits, false), level(l.levels) {
        const int64_t reach = (l.window + l.bits - 1) / l.bits - 1;
        for (int64_t u = v > reach ? v - reach : 0; u < v; ++u) pass<0>(u, 1, nullptr);
    }

    // Levels of the rows of `count` vectors, at most TILE; v is where the last ones ended.
    void next(int64_t v, int64_t count, uint8_t *out) {
        if (l.dim == 1) pass<1>(v, count, out);
        else pass<2>(v, count, out);
    }
};

struct Paths : Rows {
    template <int B> void dots(const uint8_t *level, const float *factor, int64_t b, float *start) const {
        Vec total[B];
        UNROLL for (int k = 0; k < B; ++k) total[k] = load(start + k * LANES);
        const int64_t blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const int8_t *x = in.integers + b * stride;
        for (int64_t c = 0; c < blocks; ++c, level += BLOCK, x += 2 * BLOCK) {
            const Numbers weights = numbers_at(level);
            UNROLL for (int k = 0; k < B; ++k) total[k] = added(total[k], weights, x + k * stride, factor[k * apart + c]);
        }
        UNROLL for (int k = 0; k < B; ++k) store(start + k * LANES, total[k]);
    }
    template <int B> void inputs(int64_t v, int64_t count, int64_t b, const uint8_t *level, Tile &tile) const {
        tile.make<B, true>(l, in, count, b);
        for (int64_t r = 0; r < count; ++r) dots<B>(level + r * in.stride, tile.factor + r * B * in.blocks, b, tile.start + r * B * LANES);
        sums_of(tile.start, (count * B + 3) / 4 * 4);
        for (int64_t r = 0; r < count && v * l.dim + r < l.rows; ++r)
            for (int k = 0; k < B; ++k) finish(v * l.dim + r, b + k, tile.start[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        Path path(l, begin, arena);
        const int64_t stride = padded(l.columns), together = TILE / l.dim;  // vectors: the rows of a tile
        uint8_t *level = arena.take<uint8_t>(TILE * stride);
        Tile tile(l, in, 4, arena);
        for (int64_t v = begin; v < end; v += together) {
            const int64_t count = end - v < together ? end - v : together;
            path.next(v, count, level);
            for (int64_t i = 0; i < count; ++i) load_scales(l, v + i, tile.scale + i * l.dim * tile.each, tile.shift + i * l.dim * tile.each);
            int64_t b = 0;
            for (; b + 4 <= in.batch; b += 4) inputs<4>(v, count * l.dim, b, level, tile);
            for (; b < in.batch; ++b) inputs<1>(v, count * l.dim, b, level, tile);
        }
    }
};

// Rows [first, first + count) for turned inputs, fp32 [count, columns], shared out to the threads of a parallel region.
static void decode_paths(const Layer &l, int64_t first, int64_t count, float *out, Arena &arena) {
    const int64_t stride = padded(l.columns), begin = first / l.dim, all_ = (first + count + l.dim - 1) / l.dim - begin;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t from = begin + thread * all_ / threads, to = begin + (thread + 1) * all_ / threads;
    Path path(l, from, arena);
    const int64_t together = TILE / l.dim;
    uint8_t *level = arena.take<uint8_t>(TILE * stride);
    float *scale = arena.take<float>(l.dim * room(l)), *shift = arena.take<float>(l.dim * room(l));
    for (int64_t begun = from; begun < to; begun += together) {
        const int64_t vectors = to - begun < together ? to - begun : together;
        path.next(begun, vectors, level);
        for (int64_t v = begun; v < begun + vectors; ++v) {
            load_scales(l, v, scale, shift);
            for (int64_t d = 0; d < l.dim && v * l.dim + d < first + count; ++d) {
                const uint8_t *of = level + ((v - begun) * l.dim + d) * stride;
                float *row = out + (v * l.dim + d - first) * l.columns;
                for (int64_t c = 0; c < l.columns; ++c) row[c] = scale[d * room(l)] * (float)(of[c] - 128);
            }
        }
    }
}
