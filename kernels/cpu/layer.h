// A layer's stored tensors; what its format lacks is null. Mirrored field by field in layer.py.

#pragma once

#include <stdint.h>

extern "C" {

typedef struct {
    int64_t rows, columns;       // of the weight
    int64_t bits, dim;           // of a code; weights to a code: consecutive rows of one column
    int64_t words;               // 32-bit words in a row of codes
    const uint32_t *codes;       // [ceil(rows / dim), words]
    const float *table;          // fp32 [2**bits, dim]; null: a code is its own value
    const uint16_t *half_table;  // the same in fp16, where that is exact
    const uint8_t *planes;       // the same [dim, 2, plane]: low bytes, high bytes, repeated up to 64, 128 or 256
    int64_t plane;
    int64_t group, groups;       // columns under a scale, scales to a row
    const uint16_t *half;        // fp16 scales [rows, groups], or
    const void *scale_codes;     // codes of scales [rows * groups], uint8 or a stream of
    int64_t scale_bits;          // that many bits, with
    const float *map;            // the value of each (null: itself),
    const float *steps;          // a step for every
    int64_t per_step;            // of them,
    double offset;               // and an offset
    const uint16_t *minima;      // fp16 [rows, groups], added to scale * value; or
    const uint32_t *zeros;       // one stream [rows * groups] of `bits` bits, taken from the value; or
    double centre;               // the same zero for all
    int64_t rank;
    const void *left, *right;                  // [rows, rank], [rank, columns]: int8 with
    const uint16_t *left_scale, *right_scale;  // fp16 scales [rank], or (null) fp16
    const uint16_t *row_scale, *bias;          // fp16 [rows]
} Layer;

}  // extern "C"
