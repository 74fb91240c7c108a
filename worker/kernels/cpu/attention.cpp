// One query a sequence over its blocks of the KV cache, without gathering them (Dao et al. 2022:
// softmax in one pass; Kwon et al. 2023: paged). The cache is described in
// worker/layers/attention.py.

#include "attention_tile.h"
#include "parallel.h"
#include "softmax.h"
#include "vector.h"

namespace {

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

    // Where the tokens of a tile lie, for a key-value head and those after it. Beyond the last
    // token it tells that one's place again.
    void locate(const T **tokens, int64_t sequence, int64_t head, int64_t begin) const {
        int64_t column = begin / block_size, offset = begin % block_size;
        for (int64_t k = 0; k < TILE; k++) {
            if (begin + k >= stop) {
                tokens[k] = tokens[k - 1];
                continue;
            }
            const int64_t block = blocks[sequence * num_blocks + column];
            tokens[k] = rows + ((block * block_size + offset) * 2 * kv_heads + head) * dim;
            if (++offset == block_size)
                offset = 0, column++;
        }
    }
};

// Some query heads of one sequence, and their sums over the tokens seen so far.
template <typename T>
struct Heads {
    Query<T> *queries;    // [heads, padded(dim)], 0 beyond dim
    float *sums;          // [heads, dim], in the order of `Pair`
    float *tops, *totals; // [heads]: highest score, sum of the weights
};

// N query heads from `head` on, all of key-value head `kv_head`, over a tile whose first token is
// `begin`. `first_kv` is the key-value head that the tile's pointers and `state` begin with.
template <typename T, int N>
void attend(const Decode<T> &task, Heads<T> state, Tiles<T> tiles, int64_t sequence,
            int64_t first_kv, int64_t kv_head, int64_t head, int64_t begin, int64_t count) {
    const int64_t dim = task.dim, at = (kv_head - first_kv) * dim,
                  row = head - first_kv * task.group;
    float scores[N][TILE], *sums = state.sums + row * dim;
    score<T, N>(scores, state.queries + row * padded(dim), tiles, at, count, dim, task.scale);
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
        accumulate<T, N, 2>(sums + c, scores, tiles, values + c, count, dim);
    for (; c + 2 * LANES <= dim; c += 2 * LANES)
        accumulate<T, N, 1>(sums + c, scores, tiles, values + c, count, dim);
    if (c < dim)
        accumulate_rest<T, N>(sums + c, scores, tiles, values + c, count, dim);
}

// All queries of key-value heads `first_kv` to `last_kv` of a sequence. `tiles` holds the place of
// its first tile, and in the end that of the next sequence's.
template <typename T>
void decode_heads(const Decode<T> &task, const T *(&located)[2][TILE], int64_t sequence,
                  int64_t next_sequence, int64_t first_kv, int64_t last_kv) {
    const int64_t dim = task.dim, group = task.group, num_heads = (last_kv - first_kv) * group;
    const int64_t size = num_heads * dim, offset = first_kv * group * dim;
    float *memory = static_cast<float *>(__builtin_alloca((size + 2 * num_heads) * sizeof(float)));
    auto *queries =
        static_cast<Query<T> *>(__builtin_alloca(num_heads * padded(dim) * sizeof(Query<T>)));
    const Heads<T> state{queries, memory, memory + size, memory + size + num_heads};
    memset(queries, 0, num_heads * padded(dim) * sizeof(Query<T>));
    memset(state.sums, 0, size * sizeof(float));
    for (int64_t i = 0; i < num_heads; i++) {
        const T *q = task.q + sequence * task.q_stride + offset + i * dim;
        for (int64_t c = 0; c < dim; c += LANES)
            store(queries + i * padded(dim) + c, load(q + c));
        state.tops[i] = -__builtin_inff(), state.totals[i] = 0;
    }
    for (int64_t begin = task.start; begin < task.stop; begin += TILE) {
        const int64_t end = begin + TILE, count = (end < task.stop ? end : task.stop) - begin;
        const bool is_last = end >= task.stop;
        const T **now = located[0], **ahead = located[1];
        task.locate(ahead, is_last ? next_sequence : sequence, first_kv,
                    is_last ? task.start : end);
        for (int64_t kv_head = first_kv; kv_head < last_kv; kv_head++)
            for (int64_t i = 0; i < group; i += MAX_TOGETHER) {
                const int64_t together = group - i < MAX_TOGETHER ? group - i : MAX_TOGETHER;
                auto attend_n = together == 1   ? attend<T, 1>
                                : together == 2 ? attend<T, 2>
                                : together == 3 ? attend<T, 3>
                                                : attend<T, 4>;
                attend_n(task, state, {now, i ? now : ahead}, sequence, first_kv, kv_head,
                         kv_head * group + i, begin, count);
            }
        memcpy(now, ahead, sizeof located[0]);
    }
    T *out = task.out + sequence * task.kv_heads * group * dim + offset;
    for (int64_t i = 0; i < num_heads; i++) {
        const float *sums = state.sums + i * dim, total = state.totals[i];
        int64_t c = 0;
        for (; c + 2 * LANES <= dim; c += 2 * LANES) {
            const Pair pair = load_pair(sums + c);
            store_pair(out + i * dim + c, {pair.first / total, pair.second / total});
        }
        if (c < dim)
            store(out + i * dim + c, load(sums + c) / total);
    }
}

// An item of work is some sequences one after the other; where they are few, some heads of one.
template <typename T>
void decode(const Decode<T> &task, int64_t num_threads, int64_t num_sequences) {
    constexpr int64_t ITEMS = 4; // a thread: as many as let one make up for another's delay
    int64_t parts = num_sequences < 2 * num_threads ? 2 * num_threads / num_sequences : 1;
    if (parts > task.kv_heads)
        parts = task.kv_heads;
    const int64_t together = (num_sequences + ITEMS * num_threads - 1) / (ITEMS * num_threads);
    const int64_t num_items = (num_sequences + together - 1) / together;
    const bool is_large =
        num_sequences * task.kv_heads * (task.stop - task.start) * task.dim > 1 << 16;
    for_each(num_threads, num_items * parts, is_large, [&](int64_t item) {
        const int64_t part = item % parts, first = item / parts * together;
        const int64_t first_kv = task.kv_heads * part / parts,
                      last_kv = task.kv_heads * (part + 1) / parts;
        const int64_t last =
            (first + together < num_sequences ? first + together : num_sequences) - 1;
        const T *located[2][TILE];
        task.locate(located[0], first, first_kv, task.start);
        for (int64_t sequence = first; sequence <= last; sequence++)
            decode_heads(task, located, sequence, sequence < last ? sequence + 1 : last, first_kv,
                         last_kv);
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
