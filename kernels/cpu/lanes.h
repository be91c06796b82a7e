// Sixteen fp32 lanes, their codes and their tables, once in AVX-512 with VBMI and VNNI and once in AVX2: all that decoders.h and fused.cpp know of
// either.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

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
            const __m512i raw = _mm512_maskz_loadu_epi8(first(8 * bits < left ? 8 * bits : left), p);
            for (int k = 0; k < 4; ++k) {
                code[k] = _mm512_srlv_epi32(_mm512_permutexvar_epi8(later[k], raw), shifts);
                if (!LOOSE) code[k] = _mm512_and_si512(code[k], mask);
            }
        } else {
            for (int k = 0; k < 4; ++k, p += 2 * bits, left -= 2 * bits) {
                const int64_t n = 2 * bits < left ? 2 * bits : left;
                const __m512i raw = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((__mmask32)first(n), p));
                code[k] = _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi8(bytes, raw), shifts), mask);
            }
        }
    }
    static __mmask64 first(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }
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

// Codes of at most eight bits, a byte each, and tables of fp16 values as two planes of bytes, the low ones and the high ones.
#define PLANES 1  // and integer products (integers.h)
typedef __m512i Octets;  // sixty-four codes; for words octets 0 to 3 in the even quadwords and 4 to 7 in the odd ones

struct UnpackBytes {
    __m512i at, by, mask;
    __mmask64 block;
    int64_t bits;
    // In their natural order, or so that unpacking bytes to words orders them.
    UnpackBytes(int64_t b, bool for_words) : bits(b) {
        uint8_t from[64], shift[64];
        for (int q = 0; q < 8; ++q)
            for (int k = 0; k < 8; ++k) {
                from[8 * q + k] = (uint8_t)((for_words ? q / 2 + q % 2 * 4 : q) * b + k);
                shift[8 * q + k] = (uint8_t)(k * b);
            }
        at = _mm512_loadu_si512(from);
        by = _mm512_loadu_si512(shift);
        mask = _mm512_set1_epi8((char)((1u << b) - 1));
        block = Unpack::first(8 * b);
    }
    // Which bytes belong to a block, of which the row has `left` more.
    __mmask64 bytes(int64_t left) const { return left >= 8 * bits ? block : Unpack::first(left); }
    // Bits above a code stay: tables repeat themselves.
    Octets operator()(const uint8_t *p, __mmask64 bytes) const {
        return _mm512_multishift_epi64_epi8(by, _mm512_permutexvar_epi8(at, _mm512_maskz_loadu_epi8(bytes, p)));
    }
    Octets alone(const uint8_t *p, __mmask64 bytes) const { return _mm512_and_si512((*this)(p, bytes), mask); }
};

// SIZE bytes, 64, 128 or 256: a shorter table is repeated.
template <int SIZE> static inline __m512i plane(const uint8_t *t, Octets i) {
    const __m512i a = _mm512_loadu_si512(t);
    if (SIZE == 64) return _mm512_permutexvar_epi8(i, a);
    const __m512i low = _mm512_permutex2var_epi8(a, i, _mm512_loadu_si512(t + 64));
    if (SIZE == 128) return low;
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), i, _mm512_loadu_si512(t + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(i), low, high);
}

template <int SIZE> static inline void planes(const uint8_t *t, Octets i, Vec *v) {
    const __m512i low = plane<SIZE>(t, i), high = plane<SIZE>(t + SIZE, i);
    const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(a));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1));
    v[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(b));
    v[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1));
}

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

static inline Vec load(const float *p, int64_t n) {
    if (n >= 16) return load(p);
    float copy[16] = {0};
    memcpy(copy, p, sizeof(float) * (size_t)n);
    return load(copy);
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

static inline void sums(const Vec *v, float *four) {
    for (int k = 0; k < 4; ++k) four[k] = sum(v[k]);
}

struct Unpack {
    Int at, shifts;
    __m256i mask;
    int64_t bits;
    explicit Unpack(int64_t b) : bits(b) {
        int32_t from[16], by[16];
        for (int l = 0; l < 16; ++l) from[l] = (int32_t)(l * b / 8), by[l] = (int32_t)(l * b % 8);
        at = {_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 8))};
        shifts = {_mm256_loadu_si256((const __m256i *)by), _mm256_loadu_si256((const __m256i *)(by + 8))};
        mask = _mm256_set1_epi32((int)((1u << b) - 1));
    }
    template <bool LOOSE> void operator()(const uint8_t *p, int64_t left, Int *code) const {
        for (int k = 0; k < 4; ++k, p += 2 * bits, left -= 2 * bits) {
            uint8_t copy[40];
            const uint8_t *from = p;
            if (left < 2 * bits + 4) {  // the last lane's word would reach beyond the row
                const int64_t n = left < 2 * bits ? left : 2 * bits;
                memset(copy, 0, sizeof copy);
                if (n > 0) memcpy(copy, p, (size_t)n);
                from = copy;
            }
            const __m256i low = _mm256_i32gather_epi32((const int *)from, at.a, 1), high = _mm256_i32gather_epi32((const int *)from, at.b, 1);
            code[k] = {_mm256_and_si256(_mm256_srlv_epi32(low, shifts.a), mask), _mm256_and_si256(_mm256_srlv_epi32(high, shifts.b), mask)};
        }
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

#define PLANES 0
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
