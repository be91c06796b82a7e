// Scales and shifts of rows, however they are stored, as fp32.

#pragma once

#include "decoders.h"
#include "arena.h"

static inline int64_t padded(int64_t columns) { return (columns + BLOCK - 1) / BLOCK * BLOCK; }
static inline int64_t columns_under(const Layer &l, int64_t g) {  // scale g of a row
    return l.columns - g * l.group < l.group ? l.columns - g * l.group : l.group;
}
static inline bool is_even(const Layer &l) { return l.groups == 1 || l.group % BLOCK == 0; }  // a block lies under one scale
static inline int64_t room(const Layer &l) { return (l.groups + LANES - 1) / LANES * LANES; }  // scales of a row, as whole vectors
static inline bool has_shift(const Layer &l) { return l.minima || l.zeros; }

static inline float wide(uint16_t half) { return _cvtsh_ss(half); }

// Number i of an uncompressed array.
static inline float number_at(const void *array, Dense kind, int64_t i) {
    if (kind == FP32) return ((const float *)array)[i];
    const uint16_t half = ((const uint16_t *)array)[i];
    if (kind == FP16) return wide(half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t code_at(const uint32_t *stream, int64_t index, int64_t bits) {
    const int64_t bit = index * bits, word = bit >> 5, shift = bit & 31;
    uint64_t two = stream[word];
    if (shift + bits > 32) two |= (uint64_t)stream[word + 1] << 32;
    return (uint32_t)(two >> shift) & ((1u << bits) - 1);
}

// Sixteen at a time, of the `left` that there are; `to` has room for whole vectors.
static inline void converted(const uint16_t *from, int64_t count, int64_t left, float *to) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, halves(from + i, left - i));
}

static void mapped(const uint8_t *code, const float *map, float size, float offset, int64_t count, float *to) {
    const __m256 sizes = _mm256_set1_ps(size), offsets = _mm256_set1_ps(offset);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(code + i)));
        const __m256 value = map ? _mm256_i32gather_ps(map, index, 4) : _mm256_cvtepi32_ps(index);
        _mm256_storeu_ps(to + i, _mm256_fmadd_ps(value, sizes, offsets));
    }
    for (; i < count; ++i) to[i] = __builtin_fmaf(map ? map[code[i]] : (float)code[i], size, offset);
}

// Codes of a stream as fp32, eight at a time: they are at most as many bytes.
struct Eights {
    const uint32_t *stream;
    int64_t bits, bytes;
    __m256i mask, early, late;

    Eights(const uint32_t *stream, int64_t count, int64_t bits) : stream(stream), bits(bits), bytes((count * bits + 31) / 32 * 4) {
        mask = _mm256_set1_epi32((1 << bits) - 1);
        // Places of codes 0, 1, 4, 5, and of 2, 3, 6, 7: a shuffle of their lower halves is all eight in order.
        const __m256i step = _mm256_set1_epi64x(bits);
        early = _mm256_mul_epu32(step, _mm256_setr_epi64x(0, 1, 4, 5)), late = _mm256_mul_epu32(step, _mm256_setr_epi64x(2, 3, 6, 7));
    }
    bool has(int64_t index) const { return index * bits / 8 + 8 <= bytes; }
    __m256 operator[](int64_t index) const {
        const int64_t bit = index * bits;
        uint64_t eight;
        memcpy(&eight, (const uint8_t *)stream + bit / 8, 8);
        const __m256i from_first = _mm256_set1_epi64x((long long)(eight >> bit % 8));
        const __m256 code = _mm256_shuffle_ps(_mm256_castsi256_ps(_mm256_srlv_epi64(from_first, early)), _mm256_castsi256_ps(_mm256_srlv_epi64(from_first, late)), 0x88);
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_castps_si256(code), mask));
    }
};

// Codes times size and offset, of `count` codes from number `first` of the stream on.
static void spread(const Eights &codes, int64_t first, float size, float offset, int64_t count, float *to) {
    const __m256 sizes = _mm256_set1_ps(size), offsets = _mm256_set1_ps(offset);
    int64_t i = 0;
    for (; i < count && codes.has(first + i); i += 8) {
        const __m256 eight = _mm256_fmadd_ps(codes[first + i], sizes, offsets);
        if (i + 8 <= count) {
            _mm256_storeu_ps(to + i, eight);
        } else {
            float last[8];
            _mm256_storeu_ps(last, eight);
            memcpy(to + i, last, (count - i) * sizeof(float));
        }
    }
    for (; i < count; ++i) to[i] = __builtin_fmaf((float)code_at(codes.stream, first + i, codes.bits), size, offset);
}

// Minus scale times zero, of `count` zeros from number `first` of the stream on.
static void shifts_of(const Layer &l, int64_t first, int64_t count, const float *scale, float *shift) {
    const Eights codes(l.zeros, l.rows * l.groups, l.bits);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    int64_t i = 0;
    for (; i < count && codes.has(first + i); i += 8) {
        _mm256_storeu_ps(shift + i, _mm256_xor_ps(sign, _mm256_mul_ps(_mm256_loadu_ps(scale + i), codes[first + i])));
    }
    for (; i < count; ++i) shift[i] = -scale[i] * (float)code_at(l.zeros, first + i, l.bits);
}

// Scales of `count` groups from number `first` on, whatever their rows; `scale` has room for whole vectors.
static void scales_from(const Layer &l, int64_t first, int64_t count, float *scale) {
    if (l.half) {
        converted(l.half + first, count, l.rows * l.groups - first, scale);
        return;
    }
    int64_t step = first / l.per_step, left = (step + 1) * l.per_step - first;  // one division a call, none a scale
    for (int64_t g = 0; g < count; ++step, left = l.per_step) {
        const int64_t end = g + left < count ? g + left : count;
        const float size = l.steps[step], offset = (float)l.offset;
        if (l.scale_bits == 8) {
            mapped((const uint8_t *)l.scale_codes + first + g, l.map, size, offset, end - g, scale + g);
        } else {
            spread(Eights((const uint32_t *)l.scale_codes, l.rows * l.groups, l.scale_bits), first + g, size, offset, end - g, scale + g);
        }
        g = end;
    }
}

// What the values of every group of a row are multiplied by, and what is added to them, where `has_shift`; there is room for whole vectors.
static void scales_of(const Layer &l, int64_t row, float *scale, float *shift) {
    const int64_t first = row * l.groups;  // behind the last one of the row there is anything: not used, or times zero
    scales_from(l, first, l.groups, scale);
    if (l.minima) {
        converted(l.minima + first, l.groups, l.rows * l.groups - first, shift);
    } else if (l.zeros) {
        shifts_of(l, first, l.groups, scale, shift);
    }
}
