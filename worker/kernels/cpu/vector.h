// Sixteen float lanes, and bfloat16 numbers as they lie in memory. The compiler's vector
// extensions: one source for AVX-512 (a register), AVX2 (two) and NEON (four).
#pragma once

#include <stdint.h>
#include <string.h>

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16;

struct bfloat16 {
    uint16_t bits;
};

static inline Lanes all(float value) {
    return value - (Lanes){};
}

static inline Lanes load(const float *source) {
    Lanes lanes;
    memcpy(&lanes, source, sizeof lanes);
    return lanes;
}

static inline Lanes load(const bfloat16 *source) {
    Halves halves;
    memcpy(&halves, source, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

static inline void store(float *target, Lanes lanes) {
    memcpy(target, &lanes, sizeof lanes);
}

// The bits of bfloat16 numbers, to the nearest, ties to even, as torch rounds; NaN stays NaN.
static inline Bits bits_of_bfloat16(Lanes lanes) {
    Bits bits = (Bits)lanes;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits is_nan = (Bits)(lanes != lanes);
    return (is_nan & 0x7fc0) | (~is_nan & rounded);
}

static inline void store(bfloat16 *target, Lanes lanes) {
    Halves halves = __builtin_convertvector(bits_of_bfloat16(lanes), Halves);
    memcpy(target, &halves, sizeof halves);
}

// Thirty-two numbers in the order that is cheapest: of bfloat16, those at even places and those at
// odd ones.
struct Pair {
    Lanes first, second;
};

static inline Pair load_pair(const float *source) {
    return {load(source), load(source + LANES)};
}

static inline Pair load_pair(const bfloat16 *source) {
    Bits bits;
    memcpy(&bits, source, sizeof bits);
    return {(Lanes)(bits << 16), (Lanes)(bits & 0xffff0000)};
}

static inline void store_pair(float *target, Pair pair) {
    store(target, pair.first);
    store(target + LANES, pair.second);
}

static inline void store_pair(bfloat16 *target, Pair pair) {
    Bits bits = bits_of_bfloat16(pair.first) | bits_of_bfloat16(pair.second) << 16;
    memcpy(target, &bits, sizeof bits);
}

// A value as it is after a detour through memory: layers are tested against implementations that
// round there.
template <typename T>
static inline Lanes rounded(Lanes lanes);
template <>
inline Lanes rounded<float>(Lanes lanes) {
    return lanes;
}
template <>
inline Lanes rounded<bfloat16>(Lanes lanes) {
    bfloat16 memory[LANES];
    store(memory, lanes);
    return load(memory);
}

static inline float to_float(float value) {
    return value;
}
static inline float to_float(bfloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// The lanes combined in pairs, then the results, and so on.
template <typename Combine>
static inline float reduced(Lanes x, Combine combine) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight = combine(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    Four four = combine(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                        __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    four = combine(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return combine(four, __builtin_shufflevector(four, four, 1, 0, 3, 2))[0];
}

static inline float sum(Lanes lanes) {
    return reduced(lanes, [](auto a, auto b) { return a + b; });
}

// Sums of quarters: lane 4i + v has those of lanes 4i to 4i + 3 of vector v.
static inline Lanes quarter_sums(const Lanes x[4]) {
    auto pairs = [](Lanes a, Lanes b) {
        return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13,
                                       29) +
               __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15,
                                       31);
    };
    const Lanes a = pairs(x[0], x[1]), b = pairs(x[2], x[3]);
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30,
                                   31);
}

// The sums of sixteen vectors, from those of their quarters in fours.
static inline Lanes sums_of_quarters(const Lanes x[4]) {
    auto halves = [](Lanes a, Lanes b) {
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26,
                                       27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                                       31);
    };
    return halves(halves(x[0], x[1]), halves(x[2], x[3]));
}

static inline float maximum(Lanes lanes) {
    return reduced(lanes, [](auto a, auto b) { return a > b ? a : b; });
}

static inline Lanes larger(Lanes a, Lanes b) {
    return a > b ? a : b;
}

// e^x to about 1e-7 relative, by x = n ln 2 + r and a polynomial in r (Cephes, expf); 0 below -87,
// NaN of NaN.
static inline Lanes exponential(Lanes x) {
    const Lanes smallest = all(-87.0f);
    const Lanes given = x;
    const auto is_zero = x < smallest, is_nan = x != x;
    x = larger(x, smallest);
    x = x > 88.0f ? all(88.0f) : x;
    const Lanes magic = all(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    Lanes n = (x * 1.44269504088896341f + magic) - magic;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Lanes power = (Lanes)((__builtin_convertvector(n, Integers) + 127) << 23);
    p = is_zero ? Lanes{} : p * power;
    return is_nan ? given : p;
}

// The natural logarithm to about 1e-7 relative of numbers that are positive, finite and normal, by
// x = 2^n (1 + r) and a polynomial in r (Cephes, logf).
static inline Lanes logarithm(Lanes x) {
    const Bits least = (Bits)all(0.70710678f); // 1 + r is in [sqrt(1/2), sqrt(2))
    const Bits above = (Bits)x - least;
    const Lanes n = __builtin_convertvector((Integers)above >> 23, Lanes);
    const Lanes r = (Lanes)((above & 0x7fffff) + least) - 1.0f;
    const Lanes square = r * r;
    Lanes p = all(7.0376836292e-2f);
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    p = p * r * square - n * 2.12194440e-4f - square * 0.5f;
    return r + p + n * 0.693359375f;
}
