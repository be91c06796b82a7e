// The best path through a trellis of sliding windows (kernels/formats/trellis.py), for one column of a weight.
//
// What is compressed must not depend on which kernels a machine has, so this computes, addition by addition, what methods/codecs/trellis.py says in
// torch: fp32, nothing fused (-ffp-contract=off), the first of equals. Vectors of the compiler's own kind: any instruction set will do. They are as
// long as a register is: of longer ones compilers make good sums and bad shuffles and comparisons.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else
#define LANES 4
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
static inline Vec all(float x) { return x - Vec{}; }

// Lane l of what lies at p: number l >> BITS.
template <int BITS> static inline Vec spread(const float *p) {
    if ((1 << BITS) >= LANES) return all(*p);
    const Vec v = load(p);
#define LANE(l) ((l) >> BITS)
#define FOUR(l) LANE(l), LANE(l + 1), LANE(l + 2), LANE(l + 3)
#if LANES == 16
#define ORDER FOUR(0), FOUR(4), FOUR(8), FOUR(12)
#elif LANES == 8
#define ORDER FOUR(0), FOUR(4)
#else
#define ORDER FOUR(0)
#endif
#ifdef __clang__
    return __builtin_shufflevector(v, v, ORDER);
#else
    return __builtin_shuffle(v, (Int){ORDER});
#endif
}

// Of the states that agree in all but their oldest bits, the cheapest, and which it is.
static void merge(const float *cost, int64_t groups, int64_t branches, float *best, uint8_t *from) {
    int64_t p = 0;
    for (; p + LANES <= groups; p += LANES) {
        Vec least = load(cost + p);
        Int branch = {};
        for (int64_t h = 1; h < branches; ++h) {
            const Vec other = load(cost + h * groups + p);
            const Int less = other < least;
            least = less ? other : least;
            branch = less ? (int32_t)h - Int{} : branch;
        }
        store(best + p, least);
        const Bytes narrow = __builtin_convertvector(branch, Bytes);
        memcpy(from + p, &narrow, sizeof narrow);
    }
    for (; p < groups; ++p) {
        best[p] = cost[p], from[p] = 0;
        for (int64_t h = 1; h < branches; ++h)
            if (cost[h * groups + p] < best[p]) best[p] = cost[h * groups + p], from[p] = (uint8_t)h;
    }
}

// Every state costs what its group does, and its own squared error.
template <int BITS, int DIM> static void branch(const float *best, const float *level, int64_t count, const float *value, const float *weight, float *cost) {
    const Vec x = all(value[0]), w = all(weight[0]), y = all(DIM > 1 ? value[1] : 0), v = all(DIM > 1 ? weight[1] : 0);
    for (int64_t s = 0; s < count; s += LANES) {
        const Vec e = x - load(level + s);
        Vec sum = spread<BITS>(best + (s >> BITS)) + w * (e * e);
        if (DIM > 1) {
            const Vec f = y - load(level + count + s);
            sum = sum + v * (f * f);
        }
        store(cost + s, sum);
    }
}

template <int BITS, int DIM>
static void search(const float *value, const float *weight, int64_t steps, int64_t window, const float *level, float *scratch, uint8_t *from, int32_t *states) {
    const int64_t count = (int64_t)1 << window, groups = count >> BITS;
    float *cost = scratch, *best = scratch + count;
    for (int64_t p = 0; p < groups; ++p) best[p] = INFINITY, from[p] = 0;
    best[0] = 0;
    for (int64_t t = 0; t < steps; ++t) {
        if (t > 0) merge(cost, groups, (int64_t)1 << BITS, best, from + t * groups);
        branch<BITS, DIM>(best, level, count, value + t * DIM, weight + t * DIM, cost);
    }
    int64_t last = 0;
    for (int64_t s = 1; s < count; ++s) if (cost[s] < cost[last]) last = s;
    for (int64_t t = steps - 1; t >= 0; --t) {
        states[t] = (int32_t)last;
        const int64_t group = last >> BITS;
        last = (int64_t)from[t * groups + group] * groups + group;
    }
}

extern "C" {

// states [steps] of the path of least sum of weight * (value - level)^2. value, weight [steps, dim]; level [dim, 2**window]; scratch: floats
// [2 * 2**window + 16], and bytes [steps, 2**(window - bits)]. Windows begin with zeros.
void viterbi(const float *value, const float *weight, int64_t steps, int64_t bits, int64_t dim, int64_t window, const float *level, float *scratch, uint8_t *from, int32_t *states) {
#define CASE(BITS)                                                                                          \
    case BITS:                                                                                              \
        if (dim == 1) search<BITS, 1>(value, weight, steps, window, level, scratch, from, states);          \
        else search<BITS, 2>(value, weight, steps, window, level, scratch, from, states);                   \
        break;
    switch (bits) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

}  // extern "C"
