// The tokens that a sampling rule keeps, found without sorting.
//
// A rule keeps those whose key is up to a limit: the lowest one that enough of them reach, in number
// or in weight. Keys are not negative, so their bits are in their order, and the limit's bits are
// found one after the other. What is equal is kept or dropped together.
#pragma once

#include <stdlib.h>

#include "vector.h"

constexpr int64_t PAIR = 2 * LANES;

// Arrays of a thread, kept for its next row; long enough for every vocabulary that it saw.
struct Workspace {
    float *distances, *weights, *keys, *spare_keys, *spare_weights;
    int32_t *ids;

    explicit Workspace(int64_t size) {
        static thread_local char *memory;
        static thread_local int64_t capacity;
        const int64_t length = (size / PAIR + 2) * PAIR; // room for the padding of the last pair
        if (capacity < length) {
            free(memory);
            memory = static_cast<char *>(aligned_alloc(64, length * 6 * sizeof(float)));
            if (memory == nullptr)
                abort();
            capacity = length;
        }
        float *arrays = reinterpret_cast<float *>(memory);
        distances = arrays;
        weights = arrays + capacity;
        keys = arrays + 2 * capacity;
        spare_keys = arrays + 3 * capacity;
        spare_weights = arrays + 4 * capacity;
        ids = reinterpret_cast<int32_t *>(arrays + 5 * capacity);
    }
};

// Lists the places below `count` at which a vector of `is_wanted` is set, and returns how many there
// are: write(i, n) makes place i the list's n-th. It is called for others too, which the next
// overwrites: what is wanted is hard to guess, and a wrong guess costs more.
template <typename Wanted, typename Write>
static inline int64_t list_wanted(int64_t count, const Wanted &is_wanted, const Write &write) {
    int64_t num_listed = 0;
    for (int64_t c = 0; c < count; c += LANES) {
        const Bits wanted = (Bits)is_wanted(c);
        if (!__builtin_reduce_or(wanted))
            continue;
        for (int64_t i = 0; i < LANES && c + i < count; i++) {
            write(c + i, num_listed);
            num_listed += wanted[i] & 1;
        }
    }
    return num_listed;
}

// Numbers that the last pair lacks: nothing reaches them, and they weigh nothing.
static inline void pad(float *keys, float *weights, int64_t count) {
    for (int64_t i = count; i % PAIR; i++) {
        keys[i] = __builtin_inff();
        weights[i] = 0;
    }
}

// How many keys are up to the limit, or what they weigh.
template <bool COUNTS>
static inline float up_to(float limit, const float *keys, const float *weights, int64_t count) {
    const Lanes one = all(1);
    Lanes first = {}, second = {};
    for (int64_t c = 0; c < count; c += PAIR) {
        const Pair key = load_pair(keys + c), weight = COUNTS ? Pair{one, one}
                                                              : load_pair(weights + c);
        first += key.first <= limit ? weight.first : Lanes{};
        second += key.second <= limit ? weight.second : Lanes{};
    }
    return sum(first + second);
}

static inline float number_of(uint32_t bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

// The lowest limit that `target` is reached with, infinite if it never is. Weights are >= 0 and,
// like the keys, padded.
template <bool COUNTS>
static inline float limit_for(float target, const float *keys, const float *weights, int64_t count,
                              Workspace &space) {
    constexpr int EXPONENT_BITS = 8;
    uint32_t low = 0, high = 0x7f800000; // the limit is one of low ... high
    float below = 0;                     // what those that are out of question contribute
    for (int step = 0; low < high; step++) {
        if (step == EXPONENT_BITS) { // few have the limit's exponent: go on with them alone
            const float least = number_of(low), most = number_of(high);
            Lanes sums = {};
            count = list_wanted(
                count,
                [&](int64_t c) {
                    const Lanes key = load(keys + c);
                    const Lanes weight = COUNTS ? all(1) : load(weights + c);
                    sums += key < least ? weight : Lanes{};
                    return key >= least & key <= most;
                },
                [&](int64_t i, int64_t n) {
                    space.spare_keys[n] = keys[i];
                    space.spare_weights[n] = COUNTS ? 1 : weights[i];
                });
            below = sum(sums);
            keys = space.spare_keys, weights = space.spare_weights;
            pad(space.spare_keys, space.spare_weights, count);
        }
        const uint32_t middle = low + (high - low) / 2;
        if (below + up_to<COUNTS>(number_of(middle), keys, weights, count) >= target)
            high = middle;
        else
            low = middle + 1;
    }
    return number_of(low);
}
