// Rows of trellis codes (kernels/formats/trellis.py). Part of rows.h.
//
// A code and those above it are a window of bits, so a row is decoded behind the row before it: the window of every column is kept, shifted by a
// code for every row, multiplied, and the high byte of the product looked up among 256 levels. A row is decoded to bytes, which stay in the
// first-level cache, and multiplied as codes that are numbers are: as integers (VNNI), or as fp32.

#pragma once

// Decodes rows one after the other, to levels [dim, stride] as numbers of 0 to 255 around 128, or (without VNNI) around zero.
class Path {
    const Layer &l;
    const int64_t stride, bytes, step;
    uint16_t *state;
    const uint16_t kept;
#if PLANES
    const UnpackBytes unpack;
    __m512i table[4], odd;

    // The place of a level in its four registers.
    __m512i level(__m512i place) const {
        const __m512i low = _mm512_permutex2var_epi8(table[0], place, table[1]), high = _mm512_permutex2var_epi8(table[2], place, table[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(place), low, high);
    }

    // Windows of all columns move on by the codes of vector v, and with D > 0 give the levels of its D rows.
    template <int D> void pass(int64_t v, uint8_t *out) {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        const __m512i mask = _mm512_set1_epi16((short)kept), first = _mm512_set1_epi16((short)l.first), second = _mm512_set1_epi16((short)l.second);
        for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
            prefetch(codes + at + AHEAD, step);
            const __m512i code = unpack.alone(codes + at, unpack.bytes(bytes - at));
            __m512i now[2];
            UNROLL for (int h = 0; h < 2; ++h) {
                const __m512i added = _mm512_cvtepu8_epi16(h ? _mm512_extracti64x4_epi64(code, 1) : _mm512_castsi512_si256(code));
                now[h] = _mm512_or_si512(_mm512_slli_epi16(_mm512_loadu_si512(state + c + 32 * h), (unsigned)l.bits), added);
                _mm512_storeu_si512(state + c + 32 * h, now[h]);
                now[h] = _mm512_and_si512(now[h], mask);
            }
            UNROLL for (int d = 0; d < D; ++d) {
                const __m512i by = d ? second : first;
                const __m512i place = _mm512_permutex2var_epi8(_mm512_mullo_epi16(now[0], by), odd, _mm512_mullo_epi16(now[1], by));
                _mm512_storeu_si512(out + d * stride + c, level(place));
            }
        }
    }
#else
    const Unpack unpack;

    template <int D> void pass(int64_t v, uint8_t *out) {
        const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
        for (int64_t c = 0, at = 0; c < stride; c += BLOCK, at += step) {
            Int code[4];
            int32_t of[BLOCK];
            unpack.template operator()<false>(codes + at, bytes - at, code);
            for (int k = 0; k < 4; ++k) store(of + LANES * k, code[k]);
            for (int k = 0; k < BLOCK; ++k) {
                const uint16_t now = state[c + k] = (uint16_t)(state[c + k] << l.bits | of[k]);
                for (int d = 0; d < D; ++d) out[d * stride + c + k] = (uint8_t)(l.levels[(uint16_t)((now & kept) * (d ? l.second : l.first)) >> 8] - 128);
            }
        }
    }
#endif

  public:
    // In front of vector v.
    Path(const Layer &l, int64_t v, Arena &arena)
        : l(l), stride(padded(l.columns)), bytes(4 * l.words), step(8 * l.bits), state(arena.zeros<uint16_t>(padded(l.columns))), kept((uint16_t)((1u << l.window) - 1)),
#if PLANES
          unpack(l.bits, false) {
        uint8_t high[64];
        for (int k = 0; k < 64; ++k) high[k] = (uint8_t)(2 * k + 1);
        odd = _mm512_loadu_si512(high);
        for (int k = 0; k < 4; ++k) table[k] = _mm512_loadu_si512(l.levels + 64 * k);
#else
          unpack(l.bits) {
#endif
        const int64_t reach = (l.window + l.bits - 1) / l.bits - 1;
        for (int64_t u = v > reach ? v - reach : 0; u < v; ++u) pass<0>(u, nullptr);
    }

    void next(int64_t v, uint8_t *out) {
        if (l.dim == 1) pass<1>(v, out);
        else pass<2>(v, out);
    }
};

struct Paths : Rows {
#if PLANES
    template <int B> void dots(const uint8_t *level, const float *factor, int64_t b, float *start) const {
        Vec total[B];
        UNROLL for (int k = 0; k < B; ++k) total[k] = load(start + k * LANES);
        const int64_t blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const int8_t *x = in.bytes + b * stride;
        for (int64_t c = 0; c < blocks; ++c, level += BLOCK, x += 2 * BLOCK) {
            const __m512i weights = _mm512_loadu_si512(level);
            UNROLL for (int k = 0; k < B; ++k) {
                const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(x + k * stride));
                const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), weights, _mm512_loadu_si512(x + k * stride + BLOCK));
                total[k] = fma(number(sum), all(factor[k * apart + c]), total[k]);
            }
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
#endif
    void operator()(int64_t begin, int64_t end) const {
        Path path(l, begin, arena);
        const int64_t stride = padded(l.columns), together = PLANES ? 8 / l.dim : 1;  // vectors: the rows of a tile
        uint8_t *level = arena.take<uint8_t>(8 * stride);
#if PLANES
        Tile tile(l, in, 4, arena);
        for (int64_t v = begin; v < end; v += together) {
            const int64_t count = end - v < together ? end - v : together;
            for (int64_t i = 0; i < count; ++i) {
                path.next(v + i, level + i * l.dim * stride);
                load_scales(l, v + i, tile.scale + i * l.dim * tile.each, tile.shift + i * l.dim * tile.each);
            }
            int64_t b = 0;
            for (; b + 4 <= in.batch; b += 4) inputs<4>(v, count * l.dim, b, level, tile);
            for (; b < in.batch; ++b) inputs<1>(v, count * l.dim, b, level, tile);
        }
#else
        float *scale = arena.take<float>(l.dim * room(l)), *shift = arena.take<float>(l.dim * room(l));
        for (int64_t v = begin; v < end; v += together) {
            path.next(v, level);
            load_scales(l, v, scale, shift);
            for (int64_t d = 0; d < l.dim && v * l.dim + d < l.rows; ++d)
                for (int64_t b = 0; b < in.batch; ++b) {
                    Vec total = zero();
                    for (int64_t c = 0; c < in.stride; c += LANES) total = fma(bytes((const int8_t *)level + d * stride + c), load(in.x + b * in.stride + c), total);
                    finish(v * l.dim + d, b, scale[d * room(l)] * sum(total));
                }
        }
#endif
    }
};

// Rows [first, first + count) for turned inputs, fp32 [count, columns], shared out to the threads of a parallel region.
static void decode_paths(const Layer &l, int64_t first, int64_t count, float *out, Arena &arena) {
    const int64_t stride = padded(l.columns), begin = first / l.dim, all_ = (first + count + l.dim - 1) / l.dim - begin;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t from = begin + thread * all_ / threads, to = begin + (thread + 1) * all_ / threads;
    Path path(l, from, arena);
    uint8_t *level = arena.take<uint8_t>(l.dim * stride);
    float *scale = arena.take<float>(l.dim * room(l)), *shift = arena.take<float>(l.dim * room(l));
    for (int64_t v = from; v < to; ++v) {
        path.next(v, level);
        load_scales(l, v, scale, shift);
        for (int64_t d = 0; d < l.dim && v * l.dim + d < first + count; ++d) {
            const uint8_t *of = level + d * stride;
            float *row = out + (v * l.dim + d - first) * l.columns;
            for (int64_t c = 0; c < l.columns; ++c) row[c] = scale[d * room(l)] * (float)(PLANES ? of[c] - 128 : (int8_t)of[c]);
        }
    }
}
