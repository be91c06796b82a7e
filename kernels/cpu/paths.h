// Rows of trellis codes (kernels/formats/trellis.py). Part of rows.h.
//
// A code and those above it are a window of bits, so a row is decoded behind the row before it: the window of every column is kept, shifted by a
// code for every row, multiplied, and the high byte of the product looked up among 256 levels. A row is decoded to bytes, which stay in the
// first-level cache, and multiplied as codes that are numbers are.

#pragma once

#if WIDE
// The number at each of sixty-four places among 256.
struct Levels {
    __m512i table[4], high;
    explicit Levels(const uint8_t *levels) {
        uint8_t places[64];  // of the high bytes of even columns' words and of odd ones', in turn
        for (int k = 0; k < 64; ++k) places[k] = (uint8_t)(k % 2 ? 64 + k : k + 1);
        high = _mm512_loadu_si512(places);
        for (int k = 0; k < 4; ++k) table[k] = _mm512_loadu_si512(levels + 64 * k);
    }
    __m512i high_bytes(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi8(even, high, odd); }
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
        // A block after the other, for all vectors: so windows stay in registers, those of even columns and those of odd ones.
#if WIDE
        const __m512i mask = _mm512_set1_epi16((short)kept), own = _mm512_set1_epi16((short)((1 << l.bits) - 1));
        const __m512i multiplier[2] = {_mm512_set1_epi16((short)l.first), _mm512_set1_epi16((short)l.second)};
        const unsigned bits = (unsigned)l.bits;
        const int MASKED_IN = 0xf8;  // a | (b & c)
        for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
            __m512i even = _mm512_loadu_si512(state + c), odd = _mm512_loadu_si512(state + c + 32);
            const uint8_t *from = codes + at;
            for (int64_t i = 0; i < count; ++i, from += apart) {
                _mm_prefetch((const char *)from + count * apart, _MM_HINT_T0);  // of the vectors behind these; a step is a line at most
                const __m512i code = unpack.loaded(from, bytes - i * apart - at);
                even = _mm512_ternarylogic_epi64(_mm512_slli_epi16(even, bits), code, own, MASKED_IN);
                odd = _mm512_ternarylogic_epi64(_mm512_slli_epi16(odd, bits), _mm512_srli_epi16(code, 8), own, MASKED_IN);
                UNROLL for (int d = 0; d < D; ++d) {
                    const __m512i early = _mm512_mullo_epi16(_mm512_and_si512(even, mask), multiplier[d]), late = _mm512_mullo_epi16(_mm512_and_si512(odd, mask), multiplier[d]);
                    _mm512_storeu_si512(out + (i * D + d) * stride + c, level(level.high_bytes(early, late)));
                }
            }
            _mm512_storeu_si512(state + c, even), _mm512_storeu_si512(state + c + 32, odd);
        }
#else
        const __m256i mask = _mm256_set1_epi16((short)kept), high = _mm256_set1_epi16((short)0xff00);
        const __m256i multiplier[2] = {_mm256_set1_epi16((short)l.first), _mm256_set1_epi16((short)l.second)};
        const __m128i bits = _mm_cvtsi64_si128(l.bits);
        uint8_t copy[TILE][COPIED];
        const uint8_t *from[TILE];
        for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
            for (int64_t i = 0; i < count; ++i) prefetch(codes + (count + i) * apart + at, step), from[i] = readable(codes + i * apart + at, bytes - i * apart - at, unpack.reach, step, copy[i]);
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

    // Levels and scales of the rows of `count` vectors, TILE rows at most, and how many they are (the last vector may have fewer); v is where the
    // last ones ended.
    int64_t next(int64_t v, int64_t count, uint8_t *out, float *scale) {
        const int64_t first = v * l.dim, rows = l.rows - first < count * l.dim ? l.rows - first : count * l.dim;
        if (l.dim == 1) pass<1>(v, count, out);
        else pass<2>(v, count, out);
        scales_from(l, first, rows, scale);
        return rows;
    }
};

// A row has one scale: whatever else a block's sums are multiplied by, and what they begin with, is the same for all rows.
struct Paths : Rows {
    static const int TOGETHER = WIDE ? 4 : 1;  // rows, so that inputs are loaded once for all of them

    template <int R, int B> void dots(const uint8_t *level, int64_t b, float *sums) const {
        Vec total[R][B];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) total[r][k] = load(in.sums + (b + k) * LANES);
        const int64_t apart = in.blocks, stride = 2 * in.stride;
        const int8_t *x = in.integers + b * stride;
        const float *by = in.step + b * apart;
        for (int64_t c = 0; c < in.stride / BLOCK; ++c, level += BLOCK, x += 2 * BLOCK)
            UNROLL for (int r = 0; r < R; ++r) {
                const Numbers weights = numbers_at(level + r * in.stride);
                UNROLL for (int k = 0; k < B; ++k) total[r][k] = added(total[r][k], weights, x + k * stride, by[k * apart + c]);
            }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) store(sums + (r * B + k) * LANES, total[r][k]);
    }
    // Levels [count, stride] of the rows from o on, TILE of them or the last ones.
    template <int B> void inputs(int64_t o, int64_t count, int64_t b, const uint8_t *level, const float *scale, float *sums) const {
        int64_t r = 0;
        for (; r + TOGETHER <= count; r += TOGETHER) dots<TOGETHER, B>(level + r * in.stride, b, sums + r * B * LANES);
        for (; r < count; ++r) dots<1, B>(level + r * in.stride, b, sums + r * B * LANES);
        sums_of(sums, TILE * B);
        for (r = 0; r < count; ++r)
            for (int k = 0; k < B; ++k) finish(o + r, b + k, scale[r] * sums[r * B + k]);
    }
    void operator()(int64_t begin, int64_t end) const {
        Path path(l, begin, arena);
        uint8_t *level = arena.take<uint8_t>(TILE * in.stride);
        float scale[LANES], *sums = arena.zeros<float>(TILE * 4 * LANES);
        for (int64_t v = begin, o = begin * l.dim; v < end; v += TILE / l.dim, o += TILE) {
            const int64_t rows = path.next(v, end - v < TILE / l.dim ? end - v : TILE / l.dim, level, scale);
            int64_t b = 0;
            for (; b + 4 <= in.batch; b += 4) inputs<4>(o, rows, b, level, scale, sums);
            for (; b < in.batch; ++b) inputs<1>(o, rows, b, level, scale, sums);
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
    float scale[LANES];
    for (int64_t begun = from; begun < to; begun += together) {
        // A thread's first and last vector may have rows that are not asked for.
        const int64_t o = begun * l.dim, rows = path.next(begun, to - begun < together ? to - begun : together, level, scale);
        for (int64_t r = o < first ? first - o : 0; r < rows && o + r < first + count; ++r) {
            const uint8_t *of = level + r * stride;
            float *row = out + (o + r - first) * l.columns;
            for (int64_t c = 0; c < l.columns; ++c) row[c] = scale[r] * (float)(of[c] - 128);
        }
    }
}
