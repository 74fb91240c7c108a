// A random choice from the logits of a vocabulary: rules 7 to 11 of worker/sampling/processors.py,
// then an exponential race.
#include "logits.h"
#include "noise.h"
#include "parallel.h"
#include "shortlist.h"

namespace {

struct Rules {
    float temperature, top_k, top_p, typical_p, min_p;
};

// The tokens that are left: how far each one's logit is below the largest, in temperatures, and the
// exponential of that.
struct Tokens {
    Workspace space;
    int64_t count;
    bool is_whole = true; // the vocabulary in order, so that a place is an id
    float total = 0;      // of the weights; NaN where a logit is NaN or infinite, or all are -infinite

    template <typename T>
    Tokens(const T *logits, int64_t size, float temperature) : space(size), count(size) {
        const float top = largest_of(logits, size);
        Lanes sums = {};
        for (int64_t c = 0; c < size; c += LANES) {
            const Lanes distance = (top - load_some(logits + c, size - c)) / temperature;
            const Lanes weight = exponential(-distance);
            store(space.distances + c, distance);
            store(space.weights + c, weight);
            sums += weight;
        }
        pad(space.distances, space.weights, (size + LANES - 1) / LANES * LANES);
        total = sum(sums);
    }

    // Drop what has a key above the limit.
    void keep(const float *keys, float limit) {
        count = list_wanted(
            count, [&](int64_t c) { return load(keys + c) <= limit; },
            [&](int64_t i, int64_t n) {
                space.ids[n] = is_whole ? (int32_t)i : space.ids[i];
                space.distances[n] = space.distances[i];
                space.weights[n] = space.weights[i];
            });
        is_whole = false;
        pad(space.distances, space.weights, count);
        Lanes sums = {};
        for (int64_t c = 0; c < count; c += LANES)
            sums += load(space.weights + c);
        total = sum(sums);
    }

    void apply(const Rules &rules) {
        const float *distances = space.distances, *weights = space.weights;
        if (rules.top_k > 0)
            keep(distances, limit_for<true>(rules.top_k, distances, weights, count, space));
        if (rules.top_p < 1)
            keep(distances,
                 limit_for<false>(rules.top_p * total, distances, weights, count, space));
        if (rules.typical_p < 1) {
            fill_oddities();
            keep(space.keys,
                 limit_for<false>(rules.typical_p * total, space.keys, weights, count, space));
        }
        if (rules.min_p > 0)
            keep(distances, nearest() - logarithm(all(rules.min_p))[0]);
    }

    // How far each token's surprise is from the entropy, which is the mean surprise.
    void fill_oddities() {
        Lanes sums = {};
        for (int64_t c = 0; c < count; c += LANES) {
            const Lanes weight = load(space.weights + c);
            sums += weight > 0 ? weight * load(space.distances + c) : Lanes{};
        }
        const float mean = sum(sums) / total;
        for (int64_t c = 0; c < count; c += LANES) {
            const Lanes difference = load(space.distances + c) - mean;
            store(space.keys + c, difference < 0 ? -difference : difference);
        }
        pad(space.keys, space.weights, (count + LANES - 1) / LANES * LANES);
    }

    float nearest() const {
        Lanes least = all(__builtin_inff());
        for (int64_t c = 0; c < count; c += LANES) {
            const Lanes distance = load(space.distances + c);
            least = distance < least ? distance : least;
        }
        return -maximum(-least);
    }

    Bits ids_at(int64_t place) const {
        Bits ids;
        if (is_whole) {
            for (int64_t i = 0; i < LANES; i++)
                ids[i] = (uint32_t)(place + i);
        } else {
            memcpy(&ids, space.ids + place, sizeof ids);
        }
        return ids;
    }

    // The place of the largest weight / noise, the first of equals; -1 where nothing weighs anything.
    int64_t winner(const uint32_t key[2]) const {
        Lanes best = {};
        Integers places = (Integers){} - 1;
        for (int64_t c = 0; c < count; c += LANES) {
            const Lanes weight = load(space.weights + c);
            if (!__builtin_reduce_or((Bits)(weight > 0)))
                continue;
            const Lanes score = weight / exponential_noise(ids_at(c), key);
            const auto is_better = score > best;
            best = is_better ? score : best;
            places = is_better ? (Integers){} + (int32_t)c : places;
        }
        const float most = maximum(best);
        int64_t place = -1;
        for (int64_t i = 0; i < LANES; i++)
            if (places[i] >= 0 && best[i] == most && (place < 0 || places[i] + i < place))
                place = places[i] + i;
        return place;
    }
};

template <typename T>
void choose(int64_t *tokens, float *logprobs, float *log_totals, float *values, const T *logits,
            const int64_t *rows, const Rules *rules, const uint32_t *keys, int64_t num_rows,
            int64_t size, int64_t stride, int64_t num_threads) {
    const float nan = __builtin_nanf("");
    for_each(num_threads, num_rows, num_rows * size > 1 << 15, [=](int64_t row) {
        Tokens left(logits + rows[row] * stride, size, rules[row].temperature);
        tokens[row] = 0, logprobs[row] = nan, log_totals[row] = nan;
        if (left.total != left.total)
            return;
        left.apply(rules[row]);
        const int64_t place = left.winner(keys + 2 * row);
        if (place < 0)
            return;
        tokens[row] = left.is_whole ? place : left.space.ids[place];
        log_totals[row] = logarithm(all(left.total))[0];
        logprobs[row] = -left.space.distances[place] - log_totals[row];
        if (values == nullptr)
            return;
        float *target = values + row * size;
        for (int64_t i = 0; i < size; i++)
            target[i] = -__builtin_inff();
        for (int64_t i = 0; i < left.count; i++)
            target[left.is_whole ? i : left.space.ids[i]] = -left.space.distances[i];
    });
}

} // namespace

// For rows of logits [T, size] by number: the chosen token, its log-probability among those that
// the rules keep, the logarithm of those tokens' weights in sum, and if `values` [rows, size] is
// given their distances, negative, and -infinity for the others. A row whose logits are NaN or
// infinite, or all -infinite, has a log-probability of NaN.
#define EXPORT(SUFFIX, T)                                                                          \
    extern "C" void random_##SUFFIX(int64_t *tokens, float *logprobs, float *log_totals,           \
                                    float *values, const T *logits, const int64_t *rows,           \
                                    const Rules *rules, const uint32_t *keys, int64_t num_rows,    \
                                    int64_t size, int64_t stride, int64_t num_threads) {           \
        choose<T>(tokens, logprobs, log_totals, values, logits, rows, rules, keys, num_rows, size, \
                  stride, num_threads);                                                            \
    }

EXPORT(bfloat16, bfloat16)
EXPORT(float32, float)
