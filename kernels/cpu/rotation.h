// Inputs turned as kernels/formats/rotation.py says: (A_m x H_p) diag(signs), p the largest power of two in the columns.

#pragma once

#include <math.h>

#include "lanes.h"
#include "layer.h"

// H_16: column j is the vector of signs that number j of sixteen is spread with.
struct Hadamard16 {
    Vec column[LANES];
    Hadamard16() {
        for (int j = 0; j < LANES; ++j) {
            float sign[LANES];
            for (int i = 0; i < LANES; ++i) sign[i] = __builtin_parity(i & j) ? -1.0f : 1.0f;
            column[j] = load(sign);
        }
    }
};

// y [columns] of x; `half` has room for as many.
static void turn_one(const Layer &l, const float *x, float *y, float *half) {
    const int64_t power = l.columns & -l.columns, parts = l.columns / power;
    const float by = 1 / sqrtf((float)power);
    float *to = parts > 1 ? half : y;
    for (int64_t i = 0; i < l.columns; ++i) to[i] = l.signs[i >> 5] >> (i & 31) & 1 ? -by * x[i] : by * x[i];
    int64_t begun = 1;
    if (power >= LANES) {
        const Hadamard16 hadamard;
        for (int64_t i = 0; i < l.columns; i += LANES) {
            Vec total[2] = {zero(), zero()};
            for (int j = 0; j < LANES; ++j) total[j % 2] = fma(all(to[i + j]), hadamard.column[j], total[j % 2]);
            store(to + i, plus(total[0], total[1]));
        }
        begun = LANES;
    }
    for (int64_t h = begun; h < power; h *= 2)
        for (int64_t i = 0; i < l.columns; i += 2 * h)
            for (int64_t k = i; k < i + h; ++k) {
                const float a = to[k], b = to[k + h];
                to[k] = a + b, to[k + h] = a - b;
            }
    if (parts == 1) return;
    memset(y, 0, sizeof(float) * (size_t)l.columns);
    for (int64_t j = 0; j < parts; ++j)
        for (int64_t k = 0; k < parts; ++k) {
            const float weight = l.hartley[j * parts + k];
            for (int64_t a = 0; a < power; ++a) y[j * power + a] += weight * half[k * power + a];
        }
}
