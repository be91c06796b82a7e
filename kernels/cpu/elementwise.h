// Exponentials and what is made of them, sixteen at a time, to two units in the last place.

#pragma once

#include "lanes.h"

static inline Vec exponential(Vec x) {
    x = least(most(x, all(-87.0f)), all(88.0f));
    const Vec n = whole(times(x, all(1.44269504f)));
    Vec r = fma(n, all(-0.693359375f), x);  // ln 2 in two parts
    r = fma(n, all(2.12194440e-4f), r);
    Vec p = all(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float term : terms) p = fma(p, r, all(term));
    return doubled(p, n);
}

static inline Vec silu(Vec x) { return over(x, plus(all(1.0f), exponential(minus(zero(), x)))); }
static inline Vec hyperbolic_tangent(Vec x) { return minus(all(1.0f), over(all(2.0f), plus(all(1.0f), exponential(plus(x, x))))); }
static inline Vec gelu(Vec x) {  // by tanh
    const Vec inner = times(all(0.79788456f), fma(times(times(x, x), x), all(0.044715f), x));
    return times(times(all(0.5f), x), plus(all(1.0f), hyperbolic_tangent(inner)));
}
