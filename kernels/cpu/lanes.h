// Sixteen fp32 lanes, their codes and their tables, once in AVX-512 with VBMI and once in AVX2: all that fused.cpp knows of either.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

#if defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

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

struct Unpack {  // of sixteen codes
    Int bytes, shifts, mask, later[4];
    __mmask64 block;
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
        mask = _mm512_set1_epi32((1 << b) - 1);
        for (int k = 0; k < 4; ++k) later[k] = _mm512_add_epi8(bytes, _mm512_set1_epi8((char)(2 * b * k)));
        block = b < 8 ? (1ull << 8 * b) - 1 : ~0ull;
    }
    // Four chunks from one load: codes of at most four bits. Bits above a code are left in: tables repeat themselves (Table).
    void four(const uint8_t *p, Int *code) const {
        const __m512i raw = _mm512_maskz_loadu_epi8(block, p);
        for (int k = 0; k < 4; ++k) code[k] = _mm512_srlv_epi32(_mm512_permutexvar_epi8(later[k], raw), shifts);
    }
    // `left`: bytes from p to the end of the row, of which no more than the chunk's own are read.
    Int operator()(const uint8_t *p, int64_t left) const {
        const int64_t n = 2 * bits < left ? 2 * bits : left;
        const __m256i raw = _mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), p);
        const Int words = _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(raw));
        return _mm512_and_si512(_mm512_srlv_epi32(words, shifts), mask);
    }
};

struct Table {  // of at most 64 values in registers, more in memory
    Vec v[4];
    const float *memory;
    int64_t size;
    Table(const float *values, int64_t n) : memory(values), size(n) {
        float padded[64] = {0};  // a short table is repeated: bits above its codes do no harm
        for (int64_t k = 0; k < 64 && n; ++k) padded[k] = values[k % n];
        for (int q = 0; q < 4; ++q) v[q] = load(padded + 16 * q);
    }
    template <int REGISTERS> Vec at(Int i) const {
        if (REGISTERS == 1) return _mm512_permutexvar_ps(i, v[0]);
        if (REGISTERS == 2) return _mm512_permutex2var_ps(v[0], i, v[1]);
        if (REGISTERS == 4) {
            const Vec low = _mm512_permutex2var_ps(v[0], i, v[1]), high = _mm512_permutex2var_ps(v[2], i, v[3]);
            return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), low, high);
        }
        return gather(memory, i);
    }
};

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
static inline float sum(Vec v) {
    const __m256 s = _mm256_add_ps(v.a, v.b);
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
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
        mask = _mm256_set1_epi32((1 << b) - 1);
    }
    void four(const uint8_t *p, Int *code) const {
        for (int k = 0; k < 4; ++k) code[k] = (*this)(p + 2 * bits * k, 2 * bits * (4 - k));
    }
    Int operator()(const uint8_t *p, int64_t left) const {
        uint8_t copy[40];
        if (left < 2 * bits + 4) {  // the last lane's word would reach beyond the row
            memset(copy, 0, sizeof copy);
            memcpy(copy, p, (size_t)(left < 2 * bits ? left : 2 * bits));
            p = copy;
        }
        const __m256i low = _mm256_i32gather_epi32((const int *)p, at.a, 1), high = _mm256_i32gather_epi32((const int *)p, at.b, 1);
        return {_mm256_and_si256(_mm256_srlv_epi32(low, shifts.a), mask), _mm256_and_si256(_mm256_srlv_epi32(high, shifts.b), mask)};
    }
};

struct Table {
    const float *memory;
    __m256 v[2];
    Table(const float *values, int64_t n) : memory(values) {
        float padded[16] = {0};
        for (int64_t k = 0; k < 16 && n; ++k) padded[k] = values[k % n];
        v[0] = _mm256_loadu_ps(padded), v[1] = _mm256_loadu_ps(padded + 8);
    }
    __m256 pick(__m256i i) const {
        const __m256 low = _mm256_permutevar8x32_ps(v[0], i), high = _mm256_permutevar8x32_ps(v[1], i);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));  // bit 3 decides
    }
    template <int REGISTERS> Vec at(Int i) const {
        if (REGISTERS == 1) return {pick(i.a), pick(i.b)};
        return gather(memory, i);
    }
};

#endif
