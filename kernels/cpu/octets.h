// Sixty-four codes at once: taken out of a row's stream, looked up in tables, and multiplied as integers with sixteen-bit inputs.
//
// With AVX-512 (VBMI, VNNI) codes are a register of bytes. Those that are numbers are multiplied with the high and the low bytes of inputs; bytes
// of a table's entries are interleaved to words. With AVX2 numbers of either kind are words, and every block of inputs lies as its even and odd
// columns, thirty-two after thirty-two (`Pairs`): so interleaved bytes of both are in order again, and no shuffle is spent on it. Codes of two and
// three bits are multiplied where they stand (`Standing`), with inputs that lie as every fourth column.
// A sum is of four neighbouring columns in every lane; AVX-512 has those of words as two of two columns each.

#pragma once

#include "lanes.h"

#define BLOCK 64

// How a block of inputs lies: for codes that are numbers, for words, or (AVX2) for codes that are multiplied where they stand.
enum Form { FOR_NUMBERS, FOR_WORDS, FOR_STANDING };

#if WIDE

typedef __m512i Octets;  // sixty-four bytes; for words octets 0 to 3 in the even quadwords and 4 to 7 in the odd ones

struct UnpackBytes {
    __m512i at, by, mask;
    bool half;  // of a register is all that a block's codes are
    // In their natural order, or so that unpacking bytes to words orders them.
    UnpackBytes(int64_t b, bool for_words) : half(b <= 4) {
        uint8_t from[64], shift[64];
        for (int q = 0; q < 8; ++q)
            for (int k = 0; k < 8; ++k) {
                from[8 * q + k] = (uint8_t)((for_words ? q / 2 + q % 2 * 4 : q) * b + k);
                shift[8 * q + k] = (uint8_t)(k * b);
            }
        at = _mm512_loadu_si512(from);
        by = _mm512_loadu_si512(shift);
        mask = _mm512_set1_epi8((char)((1u << b) - 1));
    }
    Octets placed(__m512i raw) const { return _mm512_multishift_epi64_epi8(by, _mm512_permutexvar_epi8(at, raw)); }

    // Of `left` bytes that can be read. Bits above a code stay: tables repeat themselves. (A mask for every load would be a tenth of the time.)
    Octets operator()(const uint8_t *p, int64_t left) const { return placed(left < 64 ? _mm512_maskz_loadu_epi8(bytes_below(left), p) : _mm512_loadu_si512(p)); }
    // The same where loads are what limits: half a register, if a block is no more, crosses fewer lines of the cache.
    Octets loaded(const uint8_t *p, int64_t left) const {
        return half && left >= 64 ? placed(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p))) : (*this)(p, left);
    }
    Octets numbers(const uint8_t *p, int64_t left) const { return _mm512_and_si512(loaded(p, left), mask); }
};

// SIZE bytes, 64, 128 or 256: a shorter table is repeated.
template <int SIZE> struct Plane {
    const uint8_t *t;
    explicit Plane(const uint8_t *table) : t(table) {}
    Octets operator()(Octets i) const {
        const __m512i a = _mm512_loadu_si512(t);
        if (SIZE == 64) return _mm512_permutexvar_epi8(i, a);
        const __m512i low = _mm512_permutex2var_epi8(a, i, _mm512_loadu_si512(t + 64));
        if (SIZE == 128) return low;
        const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), i, _mm512_loadu_si512(t + 192));
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(i), low, high);
    }
};

typedef Octets Numbers;  // of 0 to 255
struct Pairs { __m512i early, late; };  // words: pairs of columns 0 to 31, and of 32 to 63
static inline Numbers numbers_at(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline Pairs interleaved(Octets low, Octets high) { return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}; }

// Sums of products with a block of inputs, 128 bytes: the high bytes and the low ones, or words.
static inline Int dot(Numbers n, const int8_t *x) {
    const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), n, _mm512_loadu_si512(x));
    return _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), n, _mm512_loadu_si512(x + 64));
}
static inline Int dot(Pairs w, const int8_t *x) {
    return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), w.early, _mm512_loadu_si512(x)), w.late, _mm512_loadu_si512(x + 64));
}
// total + by * (their products), where it does not matter in which lane.
static inline Vec added(Vec total, Numbers n, const int8_t *x, float by) { return fma(number(dot(n, x)), all(by), total); }

#define PAIR_SUMS 2  // vectors of sums of words, where groups end within a block
static inline void dots(Pairs w, const int8_t *x, Int *sums) {
    sums[0] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w.early, _mm512_loadu_si512(x));
    sums[1] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w.late, _mm512_loadu_si512(x + 64));
}

#define LARGEST_AS_BYTES 32512  // both bytes of an integer are signed
static inline void store_integers(const Int *integer, Form form, int8_t *to) {
    for (int k = 0; k < 4; ++k) {
        if (form == FOR_NUMBERS) {
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(integer[k], _mm512_set1_epi32(128)), 8);
            const __m512i low = _mm512_sub_epi32(integer[k], _mm512_slli_epi32(high, 8));
            _mm_storeu_si128((__m128i *)(to + LANES * k), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(to + BLOCK + LANES * k), _mm512_cvtepi32_epi8(low));
        } else {
            _mm256_storeu_si256((__m256i *)(to + 2 * LANES * k), _mm512_cvtepi32_epi16(integer[k]));
        }
    }
}

#else  // AVX2

struct Octets { __m256i half[2]; };  // sixty-four bytes; for words the even columns of sixteen in front of the odd ones
struct Pairs { __m256i even[2], odd[2]; };  // words of thirty-two columns
typedef Pairs Numbers;

#define COPIED 80  // bytes that a block may reach for

// A block of `bytes` at p, or a copy of what is `left` of it where more would be read than there is.
static inline const uint8_t *readable(const uint8_t *p, int64_t left, int64_t reach, int64_t bytes, uint8_t *copy) {
    if (__builtin_expect(left >= reach, 1)) return p;
    memset(copy, 0, COPIED);
    memcpy(copy, p, (size_t)(left < bytes ? left : bytes));
    return copy;
}

// Sixteen columns are at most sixteen bytes, a lane of a register. A code is in two bytes at most: these are put into a word, the code shifted
// to its top by a multiplication, and back to its bottom.
struct UnpackBytes {
    __m256i at[2], up[2];
    int64_t bits, reach;
    bool nibbles;
    UnpackBytes(int64_t b, bool for_words) : bits(b), reach(6 * b + 16 > 8 * b ? 6 * b + 16 : 8 * b), nibbles(b == 4 && !for_words) {
        uint8_t from[2][16];
        uint16_t shift[2][8];
        for (int j = 0; j < 16; ++j) {  // places in the order of bytes
            const int64_t bit = b * (!for_words ? j : j < 8 ? 2 * j : 2 * j - 15), byte = bit / 8;
            from[j % 2][j / 2 * 2] = (uint8_t)byte;
            from[j % 2][j / 2 * 2 + 1] = byte + 1 < 2 * b ? (uint8_t)(byte + 1) : 0x80;
            shift[j % 2][j / 2] = (uint16_t)(1u << (16 - b - bit % 8));
        }
        for (int k = 0; k < 2; ++k) {
            at[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from[k]));
            up[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)shift[k]));
        }
    }

    // Half h of a block that is readable.
    void half(const uint8_t *p, int h, __m256i *even, __m256i *odd) const {
        p += 4 * bits * h;
        if (nibbles) {
            const __m256i two = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
            *even = _mm256_and_si256(two, _mm256_set1_epi16(15)), *odd = _mm256_srli_epi16(two, 4);
        } else {
            const __m128i down = _mm_cvtsi64_si128(16 - bits);
            const __m256i raw = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)), _mm_loadu_si128((const __m128i *)(p + 2 * bits)), 1);
            *even = _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(raw, at[0]), up[0]), down);
            *odd = _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(raw, at[1]), up[1]), down);
        }
    }
    Numbers numbers(const uint8_t *p, int64_t left) const {
        Numbers n;
        uint8_t copy[COPIED];
        p = readable(p, left, reach, 8 * bits, copy);
        for (int h = 0; h < 2; ++h) half(p, h, n.even + h, n.odd + h);
        return n;
    }
    // For words.
    Octets operator()(const uint8_t *p, int64_t left) const {
        Octets o;
        if (bits == 4 && left >= reach) {  // eight bytes twice, in front their lower halves and behind them their upper ones
            const __m256i twice = _mm256_setr_epi64x(0x0706050403020100, 0x0706050403020100, 0x0f0e0d0c0b0a0908, 0x0f0e0d0c0b0a0908), halves = _mm256_setr_epi64x(0, 4, 0, 4);
            for (int h = 0; h < 2; ++h) {
                const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p + h));
                o.half[h] = _mm256_and_si256(_mm256_srlv_epi64(_mm256_shuffle_epi8(raw, twice), halves), _mm256_set1_epi8(15));
            }
            return o;
        }
        const Numbers n = numbers(p, left);
        for (int h = 0; h < 2; ++h) o.half[h] = _mm256_or_si256(n.even[h], _mm256_slli_epi16(n.odd[h], 8));
        return o;
    }
};

// Sixteen words of four codes each, and bits above them that nobody looks at.
template <int BITS> struct Standing { __m256i words; };

// Codes of two or three bits: every byte is four, every twelve bits of two bytes. (The second twelve of three bytes begin in the middle of one.)
template <int BITS> struct UnpackStanding {
    static_assert(BITS == 2 || BITS == 3, "four codes are a byte, or twelve bits");
    __m256i at;
    UnpackStanding(int64_t, bool) {
        uint8_t from[32];
        for (int k = 0; k < 32; ++k) from[k] = (uint8_t)(k / 16 * 4 + k % 16 / 4 * 3 + (k % 4 + 1) / 2);  // of eight, bytes 0 1 1 2; the upper half is read from eight on
        at = _mm256_loadu_si256((const __m256i *)from);
    }
    Standing<BITS> numbers(const uint8_t *p, int64_t left) const {
        uint8_t copy[COPIED];
        p = readable(p, left, 8 * BITS, 8 * BITS, copy);
        const __m128i first = _mm_loadu_si128((const __m128i *)p);
        if (BITS == 2) return {_mm256_cvtepu8_epi16(first)};
        const __m256i raw = _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128((const __m128i *)(p + 8)), 1);
        const __m256i twelve = _mm256_shuffle_epi8(raw, at);
        return {_mm256_blend_epi16(twelve, _mm256_srli_epi16(twelve, 4), 0xaa)};
    }
};

// SIZE bytes, 16 to 256. A shuffle looks sixteen of them up, and gives nothing for a place with its highest bit set: as a place less sixteen has
// below sixteen, and the same of the following tables. So every table is stored less (xor) the one before it, and what is found in all is summed.
template <int SIZE> struct Plane {
    __m256i part[SIZE / 16];
    explicit Plane(const uint8_t *t) {
        for (int k = 0; k < SIZE / 16; ++k) {
            __m128i own = _mm_loadu_si128((const __m128i *)t + k);
            if (k % 8) own = _mm_xor_si128(own, _mm_loadu_si128((const __m128i *)t + k - 1));  // places from 128 on begin anew
            part[k] = _mm256_broadcastsi128_si256(own);
        }
    }
    template <int PARTS> static __m256i from(const __m256i *part, __m256i place) {
        const __m256i sixteen = _mm256_set1_epi8(16);
        __m256i found[2] = {_mm256_shuffle_epi8(part[0], place), _mm256_setzero_si256()};  // two chains
        UNROLL for (int k = 1; k < PARTS; ++k) {
            place = _mm256_subs_epi8(place, sixteen);
            found[k % 2] = _mm256_xor_si256(found[k % 2], _mm256_shuffle_epi8(part[k], place));
        }
        return _mm256_xor_si256(found[0], found[1]);
    }
    Octets operator()(Octets i) const {
        Octets found;
        for (int h = 0; h < 2; ++h) {
            found.half[h] = from<SIZE < 128 ? SIZE / 16 : 8>(part, i.half[h]);
            if (SIZE == 256) found.half[h] = _mm256_xor_si256(found.half[h], from<8>(part + SIZE / 32, _mm256_xor_si256(i.half[h], _mm256_set1_epi8((char)0x80))));
        }
        return found;
    }
};

static inline Numbers numbers_at(const uint8_t *p) {
    Numbers n;
    for (int h = 0; h < 2; ++h) {
        const __m256i two = _mm256_loadu_si256((const __m256i *)p + h);
        n.even[h] = _mm256_and_si256(two, _mm256_set1_epi16(255)), n.odd[h] = _mm256_srli_epi16(two, 8);
    }
    return n;
}
static inline Pairs interleaved(Octets low, Octets high) {
    Pairs w;
    for (int h = 0; h < 2; ++h) w.even[h] = _mm256_unpacklo_epi8(low.half[h], high.half[h]), w.odd[h] = _mm256_unpackhi_epi8(low.half[h], high.half[h]);
    return w;
}

static inline __m256i dot(__m256i even, __m256i odd, const __m256i *x) {
    return _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_loadu_si256(x)), _mm256_madd_epi16(odd, _mm256_loadu_si256(x + 1)));
}
static inline Int dot(Pairs w, const int8_t *x) { return {dot(w.even[0], w.odd[0], (const __m256i *)x), dot(w.even[1], w.odd[1], (const __m256i *)x + 2)}; }
static inline Vec added(Vec total, Numbers n, const int8_t *x, float by) {  // eight products of numbers are a sum of 32 bits too
    const Int sum = dot(n, x);
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(sum.a, sum.b)), _mm256_set1_ps(by), total.a), total.b};
}
// Of four codes in a word each is masked, not moved: its products are so many times too large, which is undone in their sums, without loss.
template <int BITS> static inline Vec added(Vec total, Standing<BITS> code, const int8_t *x, float by) {
    const __m256i mask = _mm256_set1_epi16((1 << BITS) - 1);
    __m256i sum = _mm256_setzero_si256();
    UNROLL for (int q = 3; q >= 0; --q) {
        const __m256i own = _mm256_madd_epi16(_mm256_and_si256(code.words, _mm256_slli_epi16(mask, q * BITS)), _mm256_loadu_si256((const __m256i *)x + q));
        sum = q == 3 ? own : _mm256_add_epi32(_mm256_srai_epi32(sum, BITS), own);
    }
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(by), total.a), total.b};
}
#define PAIR_SUMS 1
static inline void dots(Pairs w, const int8_t *x, Int *sums) { sums[0] = dot(w, x); }

// Every fourth column: 0, 4, 8 and so on, then 1, 5, 9.
static inline void store_fourths(const Int *integer, int8_t *to) {
    const __m256i twos = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    const __m256i together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i four[4], half[4];  // of sixteen columns, four by four
    for (int k = 0; k < 4; ++k) {
        const __m256i sixteen = _mm256_permute4x64_epi64(_mm256_packs_epi32(integer[k].a, integer[k].b), 0xd8);
        four[k] = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(sixteen, twos), together);
    }
    for (int k = 0; k < 4; k += 2) half[k] = _mm256_unpacklo_epi64(four[k], four[k + 1]), half[k + 1] = _mm256_unpackhi_epi64(four[k], four[k + 1]);
    for (int k = 0; k < 2; ++k) {
        _mm256_storeu_si256((__m256i *)to + k, _mm256_permute2x128_si256(half[k], half[2 + k], 0x20));
        _mm256_storeu_si256((__m256i *)to + 2 + k, _mm256_permute2x128_si256(half[k], half[2 + k], 0x31));
    }
}

#define LARGEST_AS_BYTES 32767
static inline void store_integers(const Int *integer, Form form, int8_t *to) {
    if (form == FOR_STANDING) return store_fourths(integer, to);
    for (int h = 0; h < 2; ++h) {
        const Int a = integer[2 * h], b = integer[2 * h + 1];
        __m256 four[4];  // columns 0 to 3 and 16 to 19, and so on
        four[0] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a.a, b.a, 0x20)), four[1] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a.a, b.a, 0x31));
        four[2] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a.b, b.b, 0x20)), four[3] = _mm256_castsi256_ps(_mm256_permute2x128_si256(a.b, b.b, 0x31));
        const __m256 even[2] = {_mm256_shuffle_ps(four[0], four[1], 0x88), _mm256_shuffle_ps(four[2], four[3], 0x88)};
        const __m256 odd[2] = {_mm256_shuffle_ps(four[0], four[1], 0xdd), _mm256_shuffle_ps(four[2], four[3], 0xdd)};
        _mm256_storeu_si256((__m256i *)to + 2 * h, _mm256_packs_epi32(_mm256_castps_si256(even[0]), _mm256_castps_si256(even[1])));
        _mm256_storeu_si256((__m256i *)to + 2 * h + 1, _mm256_packs_epi32(_mm256_castps_si256(odd[0]), _mm256_castps_si256(odd[1])));
    }
}

#endif
