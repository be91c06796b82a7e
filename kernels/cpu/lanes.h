// Sixteen fp32 lanes, their codes and their tables, once in AVX-512 with VBMI and VNNI and once in AVX2: all that decoders.h and fused.cpp know of
// either.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

#define UNROLL _Pragma("GCC unroll 32")  // arrays of registers stay in registers

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#define WIDE 1

typedef __m512 Vec;
typedef __m512i Int;
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline Vec all(float v) { return _mm512_set1_ps(v); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec number(Int i) { return _mm512_cvtepi32_ps(i); }
static inline void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store(int32_t *p, Int v) { _mm512_storeu_si512(p, v); }
static inline Vec gather(const float *table, Int i) { return _mm512_i32gather_ps(i, table, 4); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
static inline void sums(const Vec *v, float *four) {  // of four vectors
    __m256 half[4];
    for (int k = 0; k < 4; ++k) half[k] = _mm256_add_ps(_mm512_castps512_ps256(v[k]), _mm512_extractf32x8_ps(v[k], 1));
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(four, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
static inline Int octets(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline Vec load(const float *p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1), p); }  // zeros behind n
static inline Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec minus(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec over(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec most(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec whole(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec doubled(Vec a, Vec times) { return _mm512_scalef_ps(a, times); }  // a * 2**times, whole numbers
static inline Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
static inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }
static inline Int nearest(Vec a) { return _mm512_cvtps_epi32(a); }

// The first `n` of sixty-four bytes.
static inline __mmask64 bytes_below(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

struct Unpack {  // of sixty-four codes, sixteen to a vector
    Int bytes, shifts, mask, later[4];
    int64_t bits;
    explicit Unpack(int64_t b) : bits(b) {
        uint8_t at[64];
        int32_t by[16];
        for (int l = 0; l < 16; ++l) {
            for (int k = 0; k < 4; ++k) at[4 * l + k] = (uint8_t)(l * b / 8 + k);
            by[l] = (int32_t)(l * b % 8);
        }
        bytes = _mm512_loadu_si512(at);
        shifts = _mm512_loadu_si512(by);
        mask = _mm512_set1_epi32((int)((1u << b) - 1));
        for (int k = 0; k < 4; ++k) later[k] = _mm512_add_epi8(bytes, _mm512_set1_epi8((char)(2 * b * k)));
    }
    // `left`: bytes from p to the end of the row, of which no more are read; codes beyond are zero. With `LOOSE`, bits above a code of at
    // most four stay: tables repeat themselves.
    template <bool LOOSE> void operator()(const uint8_t *p, int64_t left, Int *code) const {
        if (LOOSE || bits <= 4) {
            const __m512i raw = _mm512_maskz_loadu_epi8(bytes_below(8 * bits < left ? 8 * bits : left), p);
            for (int k = 0; k < 4; ++k) {
                code[k] = _mm512_srlv_epi32(_mm512_permutexvar_epi8(later[k], raw), shifts);
                if (!LOOSE) code[k] = _mm512_and_si512(code[k], mask);
            }
        } else {
            for (int k = 0; k < 4; ++k, p += 2 * bits, left -= 2 * bits) {
                const int64_t n = 2 * bits < left ? 2 * bits : left;
                const __m512i raw = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((__mmask32)bytes_below(n), p));
                code[k] = _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi8(bytes, raw), shifts), mask);
            }
        }
    }
};

// At most sixteen values in a register; bits above a code do no harm.
struct Register {
    Vec v;
    Register() : v(zero()) {}
    explicit Register(const float *sixteen) : v(load(sixteen)) {}
    Register(const float *values, int64_t n, int64_t stride) {
        float repeated[16];
        for (int64_t k = 0; k < 16; ++k) repeated[k] = values[k % n * stride];
        v = load(repeated);
    }
    Vec at(Int i) const { return _mm512_permutexvar_ps(i, v); }
};

// Sixteen entries of two or four fp16 values, one vector for each place.
static inline void entries2(const uint16_t *table, Int code, Vec *v) {
    const __m512i e = _mm512_i32gather_epi32(code, table, 4);
    v[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(e));
    v[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(e, 16)));
}

static inline void entries4(const uint16_t *table, Int code, Vec *v) {
    static const uint16_t PLACES[64] = {
        0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
        2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
    const __m512i low = _mm512_i32gather_epi64(_mm512_castsi512_si256(code), table, 8);
    const __m512i high = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(code, 1), table, 8);
    const __m512i a = _mm512_permutex2var_epi16(low, _mm512_loadu_si512(PLACES), high);
    const __m512i b = _mm512_permutex2var_epi16(low, _mm512_loadu_si512(PLACES + 32), high);
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(a));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1));
    v[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(b));
    v[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1));
}

static inline Int scaled(Int i, int by) { return _mm512_mullo_epi32(i, _mm512_set1_epi32(by)); }
static inline Vec halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline Vec halves(const uint16_t *p, int64_t n) {  // zeros behind n
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1), p));
}
static inline Vec brains(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline Vec bytes(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }

#else  // AVX2 with FMA and F16C

#define WIDE 0

struct Vec { __m256 a, b; };
struct Int { __m256i a, b; };
static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Vec load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline Vec all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
static inline Vec times(Vec a, Vec b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
static inline Vec number(Int i) { return {_mm256_cvtepi32_ps(i.a), _mm256_cvtepi32_ps(i.b)}; }
static inline void store(float *p, Vec v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static inline void store(int32_t *p, Int v) { _mm256_storeu_si256((__m256i *)p, v.a); _mm256_storeu_si256((__m256i *)(p + 8), v.b); }
static inline Vec gather(const float *table, Int i) { return {_mm256_i32gather_ps(table, i.a, 4), _mm256_i32gather_ps(table, i.b, 4)}; }
static inline Int octets(const uint8_t *p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
static inline float sum(Vec v) {
    const __m256 s = _mm256_add_ps(v.a, v.b);
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

static inline __m256 first_of_eight(const float *p, int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
}
static inline Vec load(const float *p, int64_t n) {
    if (n >= 16) return load(p);
    return {first_of_eight(p, n), first_of_eight(p + 8, n - 8)};
}
static inline Vec plus(Vec a, Vec b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
static inline Vec minus(Vec a, Vec b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
static inline Vec over(Vec a, Vec b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
static inline Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
static inline Vec most(Vec a, Vec b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
static inline Vec whole(Vec a) {
    return {_mm256_round_ps(a.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), _mm256_round_ps(a.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 doubled(__m256 a, __m256 times) {
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(times), _mm256_set1_epi32(127)), 23)));
}
static inline Vec doubled(Vec a, Vec times) { return {doubled(a.a, times.a), doubled(a.b, times.b)}; }

static inline Vec magnitude(Vec a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
static inline float largest(Vec a) {
    const __m256 s = _mm256_max_ps(a.a, a.b);
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)), d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
static inline Int nearest(Vec a) { return {_mm256_cvtps_epi32(a.a), _mm256_cvtps_epi32(a.b)}; }

static inline void sums(const Vec *v, float *four) {
    __m256 half[4];
    for (int k = 0; k < 4; ++k) half[k] = _mm256_add_ps(v[k].a, v[k].b);
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(four, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}

// Eight codes are at most sixteen bytes (of sixteen bits each): those of a code are put into a lane, and shifted.
struct Unpack {
    __m256i at, shifts, mask;
    int64_t bits;
    explicit Unpack(int64_t b) : bits(b) {
        uint8_t from[32];
        int32_t by[8];
        for (int l = 0; l < 8; ++l) {
            for (int k = 0; k < 4; ++k) from[4 * l + k] = (uint8_t)(l * b / 8 + k < b ? l * b / 8 + k : 0x80);
            by[l] = (int32_t)(l * b % 8);
        }
        at = _mm256_loadu_si256((const __m256i *)from), shifts = _mm256_loadu_si256((const __m256i *)by);
        mask = _mm256_set1_epi32((int)((1u << b) - 1));
    }
    __m256i eight(const uint8_t *p) const {
        const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
        return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(raw, at), shifts), mask);
    }
    template <bool LOOSE> void operator()(const uint8_t *p, int64_t left, Int *code) const {
        uint8_t copy[144];
        if (__builtin_expect(left < 7 * bits + 16, 0)) {
            memset(copy, 0, sizeof copy);
            memcpy(copy, p, (size_t)(left < 8 * bits ? left : 8 * bits));
            p = copy;
        }
        for (int k = 0; k < 4; ++k, p += 2 * bits) code[k] = {eight(p), eight(p + bits)};
    }
};

struct Register {
    __m256 low, high;
    Register() : low(_mm256_setzero_ps()), high(_mm256_setzero_ps()) {}
    explicit Register(const float *sixteen) : low(_mm256_loadu_ps(sixteen)), high(_mm256_loadu_ps(sixteen + 8)) {}
    Register(const float *values, int64_t n, int64_t stride) {
        float repeated[16];
        for (int64_t k = 0; k < 16; ++k) repeated[k] = values[k % n * stride];
        low = _mm256_loadu_ps(repeated), high = _mm256_loadu_ps(repeated + 8);
    }
    __m256 pick(__m256i i) const {
        const __m256 a = _mm256_permutevar8x32_ps(low, i), b = _mm256_permutevar8x32_ps(high, i);
        return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // bit 3 decides
    }
    Vec at(Int i) const { return {pick(i.a), pick(i.b)}; }
};

static inline Int scaled(Int i, int by) {
    const __m256i m = _mm256_set1_epi32(by);
    return {_mm256_mullo_epi32(i.a, m), _mm256_mullo_epi32(i.b, m)};
}
static inline Vec halves(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
static inline Vec halves(const uint16_t *p, int64_t n) {
    if (n >= 16) return halves(p);
    uint16_t copy[16] = {0};
    memcpy(copy, p, sizeof(uint16_t) * (size_t)n);
    return halves(copy);
}
static inline __m256 brains8(const uint16_t *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16)); }
static inline Vec brains(const uint16_t *p) { return {brains8(p), brains8(p + 8)}; }
static inline Vec bytes(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}

#endif
