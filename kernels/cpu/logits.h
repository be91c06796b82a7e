// What is asked of rows of logits, in two readings of a row: the first from memory, the second from the second-level cache.

#pragma once

#include <math.h>

#include "elementwise.h"

#define STRIP 1024  // numbers summed in fp32 before they go into a sum in fp64

struct Compared {
    double lse;        // log of the sum of exponentials
    double kld;        // KL(reference || model), in nats
    double reverse;    // KL(model || reference)
    double highest;    // of the model's logits
    int64_t first;     // and the first place it stands at
};

// Sums over a strip, of e = exp(value - highest) and of e times the difference (reference - model, both less their highest).
struct Strips {
    double e = 0, times_difference = 0;
    void add(Vec strip, Vec products) { e += sum(strip), times_difference += sum(products); }
    void add(float value, float difference) { e += value, times_difference += (double)value * difference; }
};

static inline float highest_of(const float *row, int64_t count, float &poison) {
    Vec most_of = all(-INFINITY), none = zero();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vec value = load(row + i);
        most_of = most(most_of, value);
        none = fma(value, zero(), none);  // what is not finite times nothing is no number
    }
    float lanes[LANES], found = -INFINITY;
    store(lanes, most_of);
    for (float lane : lanes) found = lane > found ? lane : found;
    poison += sum(none);
    for (; i < count; ++i) found = row[i] > found ? row[i] : found, poison += row[i] * 0;
    return found;
}

// Of a row of the model's logits, and of the reference's (null: none). All is no number where a logit is not finite.
static Compared compare_row(const float *model, const float *reference, int64_t count) {
    float poison = 0;
    const float high = highest_of(model, count, poison), reference_high = reference ? highest_of(reference, count, poison) : 0;
    if (poison != 0) return {NAN, NAN, NAN, NAN, 0};
    Strips own, other;
    for (int64_t from = 0; from < count; from += STRIP) {
        const int64_t to = from + STRIP < count ? from + STRIP : count;
        Vec sums_of[4] = {zero(), zero(), zero(), zero()};
        int64_t i = from;
        for (; i + LANES <= to; i += LANES) {
            const Vec b = minus(load(model + i), all(high)), q = exponential(b);
            sums_of[0] = plus(sums_of[0], q);
            if (!reference) continue;
            const Vec a = minus(load(reference + i), all(reference_high)), p = exponential(a), difference = minus(a, b);
            sums_of[1] = fma(q, difference, sums_of[1]);
            sums_of[2] = plus(sums_of[2], p);
            sums_of[3] = fma(p, difference, sums_of[3]);
        }
        own.add(sums_of[0], sums_of[1]), other.add(sums_of[2], sums_of[3]);
        for (; i < to; ++i) {
            const float b = model[i] - high, a = reference ? reference[i] - reference_high : b;
            own.add(expf(b), a - b), other.add(expf(a), a - b);
        }
    }
    // sum p (a - b) - lse(a) + lse(b) for logits a, b less their highest, and its mirror image.
    const double offset = log(own.e) - log(other.e);
    int64_t first = 0;
    while (model[first] != high) ++first;
    return {high + log(own.e), other.times_difference / other.e + offset, -own.times_difference / own.e - offset, high, first};
}
