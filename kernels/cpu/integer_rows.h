// Rows multiplied as integers (AVX-512 with VBMI and VNNI). Part of rows.h.
//
// Sixty-four codes are a register of bytes. Where they are numbers, four neighbours of them times the high bytes of their inputs are summed in
// one instruction, and times the low bytes in another. Where they are places in a table, two lookups give the bytes of sixteen-bit entries, and
// two neighbours times two inputs are summed at once. Then a conversion and a multiplication by the scale, for a lane of four or two columns.

#pragma once

#if PLANES

// A row's scales times the steps of the inputs' integers, [B, blocks]; of rows whose blocks lie under one scale each.
static void factors(const Layer &l, const Inputs &in, const float *scale, int64_t first_input, int64_t count, float *factor) {
    const int64_t per = l.group / BLOCK, blocks = in.stride / BLOCK;
    for (int64_t c = 0; c < blocks; c += LANES) {
        Vec of_block;
        if (l.groups == 1) {
            of_block = all(scale[0]);
        } else if (per == 1) {
            of_block = load(scale + c, l.groups - c);
        } else {
            float each[LANES];
            for (int64_t k = 0, g = c / per, left = per - c % per; k < LANES; ++k) {
                each[k] = scale[g];
                if (--left == 0 && g + 1 < l.groups) ++g, left = per;
            }
            of_block = load(each);
        }
        for (int64_t b = 0; b < count; ++b) store(factor + b * in.blocks + c, times(of_block, load(in.step + (first_input + b) * in.blocks + c)));
    }
}

// Codes that are numbers, R rows and B inputs at once.
template <bool EVEN> struct Bytes : Rows {
    template <int R, int B> void some(const UnpackBytes &unpack, int64_t o, int64_t b, float *scale, float *shift, float *factor) const {
        const uint8_t *codes[R];
        const int64_t bytes = 4 * l.words, step = 8 * l.bits;
        for (int r = 0; r < R; ++r) {
            codes[r] = (const uint8_t *)(l.codes + (o + r) * l.words);
            scales_of(l, o + r, scale + r * l.groups, shift + r * l.groups);
            if (EVEN) factors(l, in, scale + r * l.groups, b, B, factor + r * B * in.blocks);
        }
        Vec total[R][B];
        for (int r = 0; r < R; ++r) for (int k = 0; k < B; ++k) total[r][k] = zero();
        for (int64_t c = 0, at = 0; c < in.stride / BLOCK; ++c, at += step) {
            __m512i high[B], low[B];
            for (int k = 0; k < B; ++k) {
                const int8_t *x = in.bytes + 2 * ((b + k) * in.stride + c * BLOCK);
                high[k] = _mm512_loadu_si512(x), low[k] = _mm512_loadu_si512(x + BLOCK);
            }
            for (int r = 0; r < R; ++r) {
                _mm_prefetch((const char *)codes[r] + at + AHEAD, _MM_HINT_T0);
                const __m512i code = unpack.masked(codes[r] + at, bytes - at);
                for (int k = 0; k < B; ++k) {
                    __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), code, high[k]);
                    dots = _mm512_dpbusd_epi32(_mm512_slli_epi32(dots, 8), code, low[k]);
                    const Vec by = EVEN ? all(factor[(r * B + k) * in.blocks + c]) : times(in.under(scale + r * l.groups, c), all(in.step[(b + k) * in.blocks + c]));
                    total[r][k] = fma(number(dots), by, total[r][k]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < B; ++k) finish(o + r, b + k, sum(total[r][k]) + shifted(b + k, shift + r * l.groups));
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
            if (EVEN) for (int d = 0; d < D; ++d) factors(l, in, scale + d * l.groups, b, B, factor + d * B * in.blocks);
            const uint8_t *codes = (const uint8_t *)(l.codes + v * l.words);
            Vec total[D][B];
            for (int d = 0; d < D; ++d) for (int k = 0; k < B; ++k) total[d][k] = zero();
            for (int64_t c = 0, at = 0; c < in.stride / BLOCK; ++c, at += step) {
                prefetch(codes + at + AHEAD, step);
                const Octets code = unpack(codes + at, bytes - at);
                __m512i x[B][2];
                for (int k = 0; k < B; ++k) for (int h = 0; h < 2; ++h) x[k][h] = _mm512_loadu_si512(in.words + (b + k) * in.stride + c * BLOCK + 32 * h);
                for (int d = 0; d < D; ++d) {
                    const __m512i low = plane<SIZE>(l.fixed + 2 * SIZE * d, code), high = plane<SIZE>(l.fixed + 2 * SIZE * d + SIZE, code);
                    const __m512i w[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
                    for (int k = 0; k < B; ++k) {
                        const __m512i dots = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w[0], x[k][0]);
                        if (EVEN) {
                            const Vec by = all(factor[(d * B + k) * in.blocks + c]);
                            total[d][k] = fma(number(_mm512_dpwssd_epi32(dots, w[1], x[k][1])), by, total[d][k]);
                        } else {
                            const __m512i later = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w[1], x[k][1]);
                            const float *of_row = scale + d * l.groups;
                            const Vec part = fma(number(later), in.under(of_row, 2 * c + 1), times(number(dots), in.under(of_row, 2 * c)));
                            total[d][k] = fma(part, all(in.step[(b + k) * in.blocks + c]), total[d][k]);
                        }
                    }
                }
            }
            for (int64_t d = 0; d < D && v * D + d < l.rows; ++d) for (int k = 0; k < B; ++k) finish(v * D + d, b + k, entry * sum(total[d][k]));
        }
    }
    void operator()(int64_t begin, int64_t end) const {
        int64_t b = 0;
        for (; b + 2 <= in.batch; b += 2) few<2>(b, begin, end);
        if (b < in.batch) few<1>(b, begin, end);
    }
};

#endif
