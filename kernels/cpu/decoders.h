// Sixty-four codes to weights without their scales: one decoder per kind of table, for vectors of D rows.
//
//   NUMBER    a code less the centre                      REGISTER  at most 16 entries, in one register for each place of a vector
//   BYTES     at most 256 fp16 entries, as planes of      MEMORY    any table: a load for every entry
//             bytes (AVX-512 with VBMI alone)
//
// `open` reads the codes of a block, `place` gives the 4 * 16 weights of one of the D rows.

#pragma once

#include "octets.h"
#include "layer.h"

enum Kind { NUMBER, REGISTER, BYTES, MEMORY };

template <int KIND, int D> struct Decoder;

template <> struct Decoder<NUMBER, 1> {
    struct Block { Int code[4]; };
    Unpack unpack;
    const Vec centre;
    explicit Decoder(const Layer &l) : unpack(l.bits), centre(all((float)l.centre)) {}
    void open(const uint8_t *p, int64_t left, Block &block) const { unpack.operator()<false>(p, left, block.code); }
    void place(const Block &block, int, Vec *v) const {
        for (int k = 0; k < 4; ++k) v[k] = minus(number(block.code[k]), centre);
    }
};

template <int D> struct Decoder<REGISTER, D> {
    struct Block { Int code[4]; };
    Unpack unpack;
    Register table[D];
    explicit Decoder(const Layer &l) : unpack(l.bits) {
        for (int d = 0; d < D; ++d) table[d] = Register(l.table + d, (int64_t)1 << l.bits, D);
    }
    void open(const uint8_t *p, int64_t left, Block &block) const { unpack.template operator()<true>(p, left, block.code); }
    void place(const Block &block, int d, Vec *v) const {
        for (int k = 0; k < 4; ++k) v[k] = table[d].at(block.code[k]);
    }
};

#if WIDE
template <int SIZE> static inline void planes(const uint8_t *t, Octets i, Vec *v) {
    const __m512i low = Plane<SIZE>(t)(i), high = Plane<SIZE>(t + SIZE)(i);
    const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(a));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1));
    v[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(b));
    v[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1));
}

template <int SIZE, int D> struct Planes {
    typedef Octets Block;
    UnpackBytes unpack;
    const uint8_t *table;
    explicit Planes(const Layer &l) : unpack(l.bits, true), table(l.planes) {}
    void open(const uint8_t *p, int64_t left, Block &block) const { block = unpack(p, left); }
    void place(const Block &block, int d, Vec *v) const { planes<SIZE>(table + 2 * SIZE * d, block, v); }
};
#endif

template <int D> struct Decoder<MEMORY, D> {
    struct Block { Vec value[D][4]; };
    Unpack unpack;
    const Layer &layer;
    explicit Decoder(const Layer &l) : unpack(l.bits), layer(l) {}
    void open(const uint8_t *p, int64_t left, Block &block) const {
        Int code[4];
        unpack.template operator()<false>(p, left, code);
        for (int k = 0; k < 4; ++k) {
            Vec v[D];
#if WIDE
            if (D == 2 && layer.half_table) entries2(layer.half_table, code[k], v);
            else if (D == 4 && layer.half_table) entries4(layer.half_table, code[k], v);
            else
#endif
                for (int d = 0; d < D; ++d) v[d] = gather(layer.table + d, scaled(code[k], D));
            for (int d = 0; d < D; ++d) block.value[d][k] = v[d];
        }
    }
    void place(const Block &block, int d, Vec *v) const {
        for (int k = 0; k < 4; ++k) v[k] = block.value[d][k];
    }
};
