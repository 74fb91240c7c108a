// Many queries of one sequence over its keys, as two matrix products a tile of keys (Dao et al.
// 2022), in bfloat16 with float32 sums and softmax.
//
//     scores [rows, 64 keys] = queries x keysᵀ        softmax, one tile after the other
//     sums [rows, d]        += weights x values       weights rounded to bfloat16, as torch does
//
// The query heads that share a key-value head are rows of the same products. Keys and values are
// packed first, for all rows (see panels.h).
#include "panels.h"
#include "parallel.h"
#include "softmax.h"
#include "vector.h"

#ifdef __AVX512BF16__

namespace {

constexpr int VECTORS = 4;
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t TILE = PANEL; // keys
constexpr int64_t MAX_DIM = 256;
constexpr int64_t ROWS = 96; // of one item of work: their scores and sums stay in the L2 cache

struct Prompt {
    bfloat16 *out;         // [n, kv_heads * group, dim]
    const bfloat16 *q;     // the same, rows `q_stride` numbers apart
    const bfloat16 *kv;    // tokens of [2 * kv_heads, dim], or the layer's cache of blocks of them
    const int64_t *blocks; // of the cache that hold the tokens, or null: `kv` is the tokens
    const bfloat16 *mask;  // [n, num_keys], or one for each head, or null
    int64_t n, q_stride, kv_stride, block_size, num_keys, kv_heads, group, dim;
    int64_t mask_strides[3]; // of group, kv_head, query
    float scale;
    uint32_t *packed; // of all tiles and heads: keys [dim / 2, 64], values [32, dim] pairs

    int64_t num_tiles() const {
        return (num_keys + TILE - 1) / TILE;
    }
    uint32_t *keys(int64_t head, int64_t tile) const {
        return packed + (head * num_tiles() + tile) * TILE * dim;
    }
    const bfloat16 *token(int64_t k) const {
        return kv + (blocks ? blocks[k / block_size] * block_size + k % block_size : k) * kv_stride;
    }
    uint32_t *values(int64_t head, int64_t tile) const {
        return keys(head, tile) + TILE * dim / 2;
    }
};

// Keys as a weight of 64 outputs; values as a weight of `dim` outputs, panel after panel, whose
// inputs are keys. Beyond the last token there are zeros.
void pack(const Prompt &task, int64_t head, int64_t tile) {
    const int64_t first = tile * TILE, dim = task.dim;
    const int64_t count = task.num_keys - first < TILE ? task.num_keys - first : TILE;
    uint32_t *keys = task.keys(head, tile), *values = task.values(head, tile);
    for (int64_t k = 0; k < TILE; k++) {
        const bfloat16 *token = k < count ? task.token(first + k) : nullptr;
        for (int64_t pair = 0; pair < dim / 2; pair++) {
            uint32_t bits = 0;
            if (token)
                memcpy(&bits, token + head * dim + 2 * pair, sizeof bits);
            keys[pair * PANEL + k] = bits;
        }
    }
    const bfloat16 zeros[MAX_DIM] = {};
    for (int64_t k = 0; k < TILE; k += 2) {
        const int64_t at = (task.kv_heads + head) * dim;
        const bfloat16 *one = k < count ? task.token(first + k) + at : zeros;
        const bfloat16 *other = k + 1 < count ? task.token(first + k + 1) + at : zeros;
        for (int64_t c = 0; c < dim; c++)
            values[(c / PANEL * TILE / 2 + k / 2) * PANEL + c % PANEL] =
                (uint32_t)one[c].bits | (uint32_t)other[c].bits << 16;
    }
}

// Rows `first` to `first + count` of a key-value head; row r is query r / group, head r % group.
void attend(const Prompt &task, int64_t head, int64_t first, int64_t count) {
    const int64_t dim = task.dim, num_panels = (dim + PANEL - 1) / PANEL;
    alignas(64) bfloat16 queries[ROWS * MAX_DIM], weights[ROWS * TILE];
    alignas(64) float scores[ROWS * TILE], sums[MAX_DIM * ROWS];
    float tops[ROWS], totals[ROWS];
    for (int64_t r = 0; r < count; r++) {
        const int64_t query = (first + r) / task.group, member = (first + r) % task.group;
        const bfloat16 *q = task.q + query * task.q_stride + (head * task.group + member) * dim;
        memcpy(queries + r * dim, q, dim * sizeof(bfloat16));
        tops[r] = -__builtin_inff();
        totals[r] = 0;
    }
    const int64_t offset = task.num_keys - task.n; // query i sees keys up to offset + i
    const int64_t seen = offset + (first + count - 1) / task.group + 1;
    for (int64_t tile = 0; tile * TILE < seen; tile++) {
        const int64_t begin = tile * TILE;
        const int64_t width = seen - begin < TILE ? seen - begin : TILE;
        multiply<VECTORS>(scores, (const uint32_t *)queries, dim / 2, task.keys(head, tile),
                          dim / 2, true, count);
        for (int64_t r = 0; r < count; r++) {
            const int64_t query = (first + r) / task.group, member = (first + r) % task.group;
            float *row = scores + r * TILE;
            for (int64_t k = 0; k < TILE; k += LANES)
                store(row + k, load(row + k) * task.scale);
            if (task.mask) {
                const bfloat16 *mask = task.mask + member * task.mask_strides[0] +
                                       head * task.mask_strides[1] + query * task.mask_strides[2] +
                                       begin;
                for (int64_t k = 0; k < width; k++)
                    row[k] += to_float(mask[k]);
            }
            int64_t visible = offset + query + 1 - begin;
            visible = visible < 0 ? 0 : visible < width ? visible : width;
            const float shrink = weigh<TILE>(row, tops[r], totals[r], visible);
            for (int64_t k = 0; k < TILE; k += LANES)
                store(weights + r * TILE + k, load(row + k));
            if (tile && shrink != 1)
                for (int64_t p = 0; p < num_panels; p++)
                    for (int64_t c = 0; c < PANEL; c += LANES) {
                        float *sum = sums + (p * ROWS + r) * PANEL + c;
                        store(sum, load(sum) * shrink);
                    }
        }
        for (int64_t p = 0; p < num_panels; p++)
            multiply<VECTORS>(sums + p * ROWS * PANEL, (const uint32_t *)weights, TILE / 2,
                              task.values(head, tile) + p * TILE / 2 * PANEL, TILE / 2, tile == 0,
                              count);
    }
    for (int64_t r = 0; r < count; r++) {
        const int64_t query = (first + r) / task.group, member = (first + r) % task.group;
        const int64_t row = query * task.kv_heads * task.group + head * task.group + member;
        for (int64_t c = 0; c < dim; c += LANES)
            store(task.out + row * dim + c,
                  load(sums + (c / PANEL * ROWS + r) * PANEL + c % PANEL) / totals[r]);
    }
}

} // namespace

// `dim` is a multiple of 64 and at most 256; `packed` holds kv_heads * dim numbers for every key,
// of which there are as many as fill tiles of 64.
extern "C" void prompt_attention(bfloat16 *out, const bfloat16 *q, const bfloat16 *kv,
                                 const int64_t *blocks, const bfloat16 *mask, uint32_t *packed,
                                 int64_t n, int64_t q_stride, int64_t kv_stride, int64_t block_size,
                                 int64_t num_keys, int64_t kv_heads, int64_t group, int64_t dim,
                                 int64_t mask_stride_0, int64_t mask_stride_1,
                                 int64_t mask_stride_2, float scale, int64_t num_threads) {
    const Prompt task{out,        q,
                      kv,         blocks,
                      mask,       n,
                      q_stride,   kv_stride,
                      block_size, num_keys,
                      kv_heads,   group,
                      dim,        {mask_stride_0, mask_stride_1, mask_stride_2},
                      scale,      packed};
    const bool is_large = n * num_keys > 1 << 10;
    for_each(num_threads, kv_heads * task.num_tiles(), is_large,
             [&](int64_t item) { pack(task, item / task.num_tiles(), item % task.num_tiles()); });
    const int64_t parts = (n * group + ROWS - 1) / ROWS;
    for_each(num_threads, kv_heads * parts, is_large, [&](int64_t item) {
        const int64_t first = item % parts * ROWS;
        const int64_t left = n * group - first;
        attend(task, item / parts, first, left < ROWS ? left : ROWS);
    });
}
#endif
