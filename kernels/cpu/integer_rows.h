// Rows multiplied as integers (AVX-512 with VBMI and VNNI). Part of rows.h.
//
// Sixty-four codes are a register of bytes. Where they are numbers, four neighbours of them times the high bytes of their inputs are summed in
// one instruction, and times the low bytes in another. Where they are places in a table, two lookups give the bytes of sixteen-bit entries, and
// two neighbours times two inputs are summed at once. Then a conversion and a multiplication by the scale, for a lane of four or two columns.

#pragma once

#if PLANES

#define UNROLL _Pragma("GCC unroll 16")  // arrays of registers stay in registers

// A row's scales times the steps of the inputs' integers, [B, blocks]; of rows whose blocks lie under one scale each.
static void factors(const Inputs &in, const float *scale, int64_t first_input, int64_t count, float *factor) {
    for (int64_t v = 0; v < in.blocks / LANES; ++v) {
        const Vec of_block = in.under(scale, v);
        for (int64_t b = 0; b < count; ++b) store(factor + b * in.blocks + v * LANES, times(of_block, load(in.step + (first_input + b) * in.blocks + v * LANES)));
    }
}

// Codes that are numbers, R rows and B inputs at once.
template <bool EVEN> struct Bytes : Rows {
    template <int R, int B> void some(const UnpackBytes &unpack, int64_t o, int64_t b, float *scale, float *shift, float *factor) const {
        const uint8_t *codes[R];
        const int64_t bytes = 4 * l.words, step = 8 * l.bits, ahead = (AHEAD + R * bytes - 1) / (R * bytes) * R * bytes;
        for (int r = 0; r < R; ++r) {
            codes[r] = (const uint8_t *)(l.codes + (o + r) * l.words);
            scales_of(l, o + r, scale + r * l.groups, shift + r * l.groups);
            if (EVEN) factors(in, scale + r * l.groups, b, B, factor + r * B * in.blocks);
        }
        Vec total[R][B];
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int k = 0; k < B; ++k) total[r][k] = zero();
        const int64_t blocks = in.stride / BLOCK, apart = in.blocks, stride = 2 * in.stride;
        const int8_t *x = in.bytes + b * stride;
        for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += 2 * BLOCK) {
            const __mmask64 present = unpack.bytes(bytes - at);
            __m512i high[B], low[B];
            UNROLL for (int k = 0; k < B; ++k) high[k] = _mm512_loadu_si512(x + k * stride), low[k] = _mm512_loadu_si512(x + k * stride + BLOCK);
            UNROLL for (int r = 0; r < R; ++r) {
                _mm_prefetch((const char *)codes[r] + at + ahead, _MM_HINT_T0);
                const __m512i code = unpack.alone(codes[r] + at, present);
                UNROLL for (int k = 0; k < B; ++k) {
                    __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), code, high[k]);
                    dots = _mm512_dpbusd_epi32(_mm512_slli_epi32(dots, 8), code, low[k]);
                    const Vec by = EVEN ? all(factor[(r * B + k) * apart + c]) : times(in.under(scale + r * l.groups, c), all(in.step[(b + k) * apart + c]));
                    total[r][k] = fma(number(dots), by, total[r][k]);
                }
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int k = 0; k < B; ++k) finish(o + r, b + k, sum(total[r][k]) + shifted(b + k, shift + r * l.groups));
    }

    template <int R> void rows(const UnpackBytes &unpack, int64_t o, float *scale, float *shift, float *factor) const {
        int64_t b = 0;
        for (; b + 4 <= in.batch; b += 4) some<R, 4>(unpack, o, b, scale, shift, factor);
        for (; b < in.batch; ++b) some<R, 1>(unpack, o, b, scale, shift, factor);
    }
    void operator()(int64_t begin, int64_t end) const {
        const UnpackBytes unpack(l.bits, false);
        float *scale = arena.take<float>(4 * l.groups), *shift = arena.take<float>(4 * l.groups), *factor = arena.take<float>(16 * in.blocks);
        int64_t o = begin;
        for (; o + 4 <= end; o += 4) rows<4>(unpack, o, scale, shift, factor);
        for (; o < end; ++o) rows<1>(unpack, o, scale, shift, factor);
    }
};

// Codes of vectors of D rows in a table of SIZE fixed-point entries, B inputs at once.
template <int SIZE, int D, bool EVEN> struct Words : Rows {
    template <int B> void few(int64_t b, int64_t begin, int64_t end) const {
        const UnpackBytes unpack(l.bits, true);
        const int64_t bytes = 4 * l.words, step = 8 * l.bits;
        float *scale = arena.take<float>(D * l.groups), *shift = arena.take<float>(D * l.groups), *factor = arena.take<float>(D * B * in.blocks);
        const float entry = (float)l.fixed_step;
        for (int64_t v = begin; v < end; ++v) {
            load_scales(l, v, scale, shift);
            if (EVEN) for (int d = 0; d < D; ++d) factors(in, scale + d * l.groups, b, B, factor + d * B * in.blocks);
            const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
            Vec total[D][B];
            UNROLL for (int d = 0; d < D; ++d) UNROLL for (int k = 0; k < B; ++k) total[d][k] = zero();
            const int64_t blocks = in.stride / BLOCK, apart = in.blocks, stride = in.stride;
            const int16_t *x = in.words + b * stride;
            for (int64_t c = 0, at = 0; c < blocks; ++c, at += step, x += BLOCK) {
                prefetch(codes + at + AHEAD, step);
                const Octets code = unpack(codes + at, unpack.bytes(bytes - at));
                __m512i early[B], late[B];
                UNROLL for (int k = 0; k < B; ++k) early[k] = _mm512_loadu_si512(x + k * stride), late[k] = _mm512_loadu_si512(x + k * stride + 32);
                UNROLL for (int d = 0; d < D; ++d) {
                    const __m512i low = plane<SIZE>(l.fixed + 2 * SIZE * d, code), high = plane<SIZE>(l.fixed + 2 * SIZE * d + SIZE, code);
                    const __m512i a = _mm512_unpacklo_epi8(low, high), z = _mm512_unpackhi_epi8(low, high);
                    UNROLL for (int k = 0; k < B; ++k) {
                        const __m512i dots = _mm512_dpwssd_epi32(_mm512_setzero_si512(), a, early[k]);
                        if (EVEN) {
                            const Vec by = all(factor[(d * B + k) * apart + c]);
                            total[d][k] = fma(number(_mm512_dpwssd_epi32(dots, z, late[k])), by, total[d][k]);
                        } else {
                            const float *of_row = scale + d * l.groups;
                            const Vec later = number(_mm512_dpwssd_epi32(_mm512_setzero_si512(), z, late[k]));
                            const Vec part = fma(later, in.under(of_row, 2 * c + 1), times(number(dots), in.under(of_row, 2 * c)));
                            total[d][k] = fma(part, all(in.step[(b + k) * apart + c]), total[d][k]);
                        }
                    }
                }
            }
            UNROLL for (int d = 0; d < D; ++d)
                if (v * D + d < l.rows) UNROLL for (int k = 0; k < B; ++k) finish(v * D + d, b + k, entry * sum(total[d][k]));
        }
    }
    void operator()(int64_t begin, int64_t end) const {
        int64_t b = 0;
        for (; b + 2 <= in.batch; b += 2) few<2>(b, begin, end);
        if (b < in.batch) few<1>(b, begin, end);
    }
};

#endif
