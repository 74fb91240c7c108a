// One query a sequence over its blocks of the KV cache, without gathering them (Dao et al. 2022:
// softmax in one pass; Kwon et al. 2023: paged). The cache is described in
// worker/layers/attention.py.

#include "parallel.h"
#include "softmax.h"
#include "vector.h"

namespace {

constexpr int64_t TILE = 32;        // tokens whose scores are in hand at once
constexpr int64_t MAX_TOGETHER = 4; // queries that share a loaded key

template <typename T>
struct Decode {
    T *out;                // [B, kv_heads * group, dim]
    const T *q;            // [B, kv_heads * group, dim], rows `q_stride` numbers apart
    const T *rows;         // [blocks, block_size, 2 * kv_heads, dim]
    const int64_t *blocks; // [B, num_blocks]
    const T *mask;         // [B, kv_heads or 1, group or 1, stop - start], or null
    int64_t q_stride, num_blocks, block_size, kv_heads, group, dim;
    int64_t start, stop; // the tokens of each sequence's blocks that are looked at
    int64_t mask_strides[3];
    float scale;

    // Where the tokens of a tile lie, for a key-value head and those after it.
    void locate(const T **tokens, int64_t sequence, int64_t head, int64_t begin,
                int64_t count) const {
        int64_t column = begin / block_size, offset = begin % block_size;
        for (int64_t k = 0; k < count; k++) {
            const int64_t block = blocks[sequence * num_blocks + column];
            tokens[k] = rows + ((block * block_size + offset) * 2 * kv_heads + head) * dim;
            if (++offset == block_size)
                offset = 0, column++;
        }
    }
};

// Begins to move a tile to the L2 cache, in the order of the addresses: head by head they are too
// far apart for the processor to guess the next.
template <typename T>
void prefetch(const T *const *tokens, int64_t count, int64_t values, int64_t size) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t part = 0; part <= values; part += values)
            for (int64_t c = 0; c < size; c += 64 / (int64_t)sizeof(T))
                __builtin_prefetch(tokens[k] + part + c, 0, 2);
}

// scores[i][k] = queries[i] . key of token k, which is `at` numbers into it.
template <typename T, int N>
void score(float (*scores)[TILE], const float *queries, const T *const *tokens, int64_t at,
           int64_t count, int64_t dim) {
    for (int64_t k = 0; k < count; k++) {
        Lanes totals[N] = {};
        for (int64_t c = 0; c < dim; c += LANES) {
            Lanes key = load(tokens[k] + at + c);
            for (int i = 0; i < N; i++)
                totals[i] += load(queries + i * dim + c) * key;
        }
        for (int i = 0; i < N; i++)
            scores[i][k] = sum(totals[i]);
    }
}

// sums[i] += weights[i][k] * value of token k; FEATURES lanes of N queries stay in registers.
template <typename T, int N, int FEATURES>
void accumulate(float *sums, const float (*weights)[TILE], const T *const *tokens, int64_t at,
                int64_t count, int64_t dim) {
    Lanes totals[N][FEATURES];
    for (int i = 0; i < N; i++)
        for (int f = 0; f < FEATURES; f++)
            totals[i][f] = load(sums + i * dim + f * LANES);
    for (int64_t k = 0; k < count; k++)
        for (int f = 0; f < FEATURES; f++) {
            Lanes value = load(tokens[k] + at + f * LANES);
            for (int i = 0; i < N; i++)
                totals[i][f] += weights[i][k] * value;
        }
    for (int i = 0; i < N; i++)
        for (int f = 0; f < FEATURES; f++)
            store(sums + i * dim + f * LANES, totals[i][f]);
}

// Some query heads of one sequence, and their sums over the tokens seen so far.
struct Heads {
    float *queries, *sums; // [heads, dim]
    float *tops, *totals;  // [heads]: highest score, sum of the weights
};

// N query heads from `head` on, all of key-value head `kv_head`, over a tile whose first token is
// `begin`. `first_kv` is the key-value head that the tile's pointers and `state` begin with.
template <typename T, int N>
void attend(const Decode<T> &task, Heads state, const T *const *tokens, int64_t sequence,
            int64_t first_kv, int64_t kv_head, int64_t head, int64_t begin, int64_t count) {
    const int64_t dim = task.dim, at = (kv_head - first_kv) * dim,
                  row = head - first_kv * task.group;
    float scores[N][TILE], *sums = state.sums + row * dim;
    score<T, N>(scores, state.queries + row * dim, tokens, at, count, dim);
    for (int i = 0; i < N; i++) {
        if (task.mask) {
            const T *mask =
                task.mask + sequence * task.mask_strides[0] + kv_head * task.mask_strides[1] +
                (head + i - kv_head * task.group) * task.mask_strides[2] + begin - task.start;
            for (int64_t k = 0; k < count; k++)
                scores[i][k] += to_float(mask[k]);
        }
        const float shrink =
            weigh<TILE>(scores[i], state.tops[row + i], state.totals[row + i], count);
        if (shrink != 1)
            for (int64_t c = i * dim; c < (i + 1) * dim; c += LANES)
                store(sums + c, load(sums + c) * shrink);
    }
    int64_t c = 0;
    const int64_t values = at + task.kv_heads * dim;
    for (; c + 4 * LANES <= dim; c += 4 * LANES)
        accumulate<T, N, 4>(sums + c, scores, tokens, values + c, count, dim);
    for (; c < dim; c += LANES)
        accumulate<T, N, 1>(sums + c, scores, tokens, values + c, count, dim);
}

// All queries of key-value heads `first_kv` to `last_kv` of a sequence.
template <typename T>
void decode_heads(const Decode<T> &task, int64_t sequence, int64_t first_kv, int64_t last_kv) {
    const int64_t dim = task.dim, group = task.group, num_heads = (last_kv - first_kv) * group;
    const int64_t size = num_heads * dim, offset = first_kv * group * dim;
    float *memory =
        static_cast<float *>(__builtin_alloca((2 * size + 2 * num_heads) * sizeof(float)));
    const Heads state{memory, memory + size, memory + 2 * size, memory + 2 * size + num_heads};
    for (int64_t c = 0; c < size; c += LANES) {
        store(state.queries + c, load(task.q + sequence * task.q_stride + offset + c) * task.scale);
        store(state.sums + c, Lanes{});
    }
    for (int64_t i = 0; i < num_heads; i++)
        state.tops[i] = -__builtin_inff(), state.totals[i] = 0;
    const T *located[2][TILE];
    int64_t count = task.stop - task.start < TILE ? task.stop - task.start : TILE, next, turn = 0;
    task.locate(located[0], sequence, first_kv, task.start, count);
    prefetch(located[0], count, task.kv_heads * dim, (last_kv - first_kv) * dim);
    for (int64_t begin = task.start; begin < task.stop;
         begin += count, count = next, turn = !turn) {
        next = task.stop - begin - count < TILE ? task.stop - begin - count : TILE;
        task.locate(located[!turn], sequence, first_kv, begin + count, next);
        prefetch(located[!turn], next, task.kv_heads * dim, (last_kv - first_kv) * dim);
        for (int64_t kv_head = first_kv; kv_head < last_kv; kv_head++)
            for (int64_t i = 0; i < group; i += MAX_TOGETHER) {
                const int64_t together = group - i < MAX_TOGETHER ? group - i : MAX_TOGETHER;
                auto attend_n = together == 1   ? attend<T, 1>
                                : together == 2 ? attend<T, 2>
                                : together == 3 ? attend<T, 3>
                                                : attend<T, 4>;
                attend_n(task, state, located[turn], sequence, first_kv, kv_head,
                         kv_head * group + i, begin, count);
            }
    }
    T *out = task.out + sequence * task.kv_heads * group * dim + offset;
    for (int64_t i = 0; i < num_heads; i++)
        for (int64_t c = i * dim; c < (i + 1) * dim; c += LANES)
            store(out + c, load(state.sums + c) / state.totals[i]);
}

// An item of work is a sequence; where they are few, some of its heads.
template <typename T>
void decode(const Decode<T> &task, int64_t num_threads, int64_t num_sequences) {
    int64_t parts = num_sequences < 2 * num_threads ? 2 * num_threads / num_sequences : 1;
    if (parts > task.kv_heads)
        parts = task.kv_heads;
    const bool is_large =
        num_sequences * task.kv_heads * (task.stop - task.start) * task.dim > 1 << 16;
    for_each(num_threads, num_sequences * parts, is_large, [&](int64_t item) {
        const int64_t part = item % parts;
        decode_heads(task, item / parts, task.kv_heads * part / parts,
                     task.kv_heads * (part + 1) / parts);
    });
}

} // namespace

// `dim` is a multiple of 16 and at most 256. Every sequence sees at least one token.
#define EXPORT(NAME, T)                                                                            \
    extern "C" void NAME(T *out, const T *q, const T *rows, const int64_t *blocks, const T *mask,  \
                         int64_t num_sequences, int64_t q_stride, int64_t num_blocks,              \
                         int64_t block_size, int64_t kv_heads, int64_t group, int64_t dim,         \
                         int64_t start, int64_t stop, int64_t mask_stride_0,                       \
                         int64_t mask_stride_1, int64_t mask_stride_2, float scale,                \
                         int64_t num_threads) {                                                    \
        decode<T>({out,                                                                            \
                   q,                                                                              \
                   rows,                                                                           \
                   blocks,                                                                         \
                   mask,                                                                           \
                   q_stride,                                                                       \
                   num_blocks,                                                                     \
                   block_size,                                                                     \
                   kv_heads,                                                                       \
                   group,                                                                          \
                   dim,                                                                            \
                   start,                                                                          \
                   stop,                                                                           \
                   {mask_stride_0, mask_stride_1, mask_stride_2},                                  \
                   scale},                                                                         \
                  num_threads, num_sequences);                                                     \
    }

EXPORT(paged_decode_bfloat16, bfloat16)
EXPORT(paged_decode_float32, float)
