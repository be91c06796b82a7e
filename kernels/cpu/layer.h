// A layer's stored tensors; what its format lacks is null. Mirrored field by field in view.py.

#pragma once

#include <stdint.h>

extern "C" {

typedef struct {
    int64_t rows, columns;       // of the weight
    int64_t bits, dim;           // of a code; weights to a code: consecutive rows of one column
    int64_t uniform;             // whether a code is its own value
    int64_t words, vectors;      // 32-bit words in a row of codes, and how many such rows there are, ceil(rows / dim)
    const uint32_t *codes;       // [vectors, words]
    const float *table;          // fp32 [2**bits, dim], unless uniform
    const uint16_t *half_table;  // the same in fp16, where that is exact
    const uint8_t *planes;       // the same [dim, 2, plane]: low bytes, high bytes, repeated up to 64, 128 or 256
    int64_t plane;
    const uint8_t *fixed;        // entries as 15-bit integers, in such planes,
    const int16_t *entries;      // or int16 [2**bits, dim], vectors of four and eight rows of more than 64,
    double fixed_step;           // times this number
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
    int64_t window;              // bits of a trellis code's window (0: no trellis), which is multiplied, 16 bits,
    int64_t first, second;       // for the first and the second row of a code, and its high byte taken for a place in
    const uint8_t *levels;       // 256 numbers around 128, of which those above mirror those below
    const uint32_t *signs;       // of inputs that are turned, a bit for every column; null: they are not
    const float *hartley;        // [m, m], where columns are m times a power of two
    const int32_t *order;        // [columns]: the column that stands at every place of the codes; null: its own
    const float *column_scale;   // [columns], in the order of the codes: what inputs of the base are multiplied by; null: by nothing
    int64_t act_bits;            // of an input of the base, after all that is done to it; 16: as it is
    const void *dense;           // uncompressed weights [rows, columns] instead of all that, each of
    int64_t dense_kind;          // enum Dense
    int64_t rank;
    const void *left, *right;                  // [rows, rank], [rank, columns in the codes' order]: int8 with
    const uint16_t *left_scale, *right_scale;  // fp16 scales [rank], or (null) fp16
    const uint16_t *row_scale, *bias;          // fp16 [rows]
} Layer;

enum Dense { FP16, BF16, FP32 };

// One decoder block of the Llama family. Norms are fp32 factors; null where the architecture has none.
typedef struct {
    const Layer *query, *key, *value, *output, *gate, *up, *down;
    const float *norm_before_attention, *norm_after_attention, *norm_before_mlp, *norm_after_mlp;  // [hidden]
    const float *norm_query, *norm_key;  // [head_dim]
    const float *cosines, *sines;        // [positions, head_dim]
    float *keys, *values;                // [batch, kv_heads, positions, head_dim]
    int64_t window;                      // positions a query sees; 0: all
} DecoderBlock;

typedef struct {
    int64_t blocks, hidden, inner, heads, kv_heads, head_dim, vocabulary, positions;
    const DecoderBlock *block;
    const void *embedding;   // [vocabulary, hidden], each of
    int64_t embedding_kind;  // enum Dense
    double embedding_scale;
    const float *norm;       // [hidden]
    const Layer *head;
    double epsilon;          // of all norms
    double attention_scale, attention_cap, logit_cap;  // caps: 0 for none
    int64_t gelu;            // the activation: SiLU, or (1) GELU by tanh
} Model;

}  // extern "C"
