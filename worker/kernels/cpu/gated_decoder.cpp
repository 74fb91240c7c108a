// All layers of a step that only decodes, in one call: what Python does between them is a tenth of
// a step of one row.
#include "gated_block.h"

#ifdef __AVX512BF16__

extern "C" void paged_decode_bfloat16(bfloat16 *, const bfloat16 *, const bfloat16 *,
                                      const int64_t *, const bfloat16 *, int64_t, int64_t, int64_t,
                                      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                      int64_t, int64_t, float, int64_t);

// These four as gated_decoder.py lays them out.

// A `DecodeGroup` of metadata.py: sequences that read the same number of blocks.
struct Group {
    int64_t first_row, num_sequences;
    const int64_t *blocks;
    int64_t num_blocks, keep_start, keep_stop; // of a sequence
    const bfloat16 *mask;                      // or null
    int64_t mask_strides[3];
};

struct View {
    const Group *groups;
    int64_t num_groups;
};

struct Layer {
    const Block *block;
    bfloat16 *cache;
    int64_t view;
    double scale;
};

struct Step {
    const View *views;
    const bfloat16 *cos, *sin;
    const int64_t *cache_rows;
    const int64_t *entered; // blocks that are zeroed first
    int64_t num_entered, block_size, num_rows;
};

namespace {

void clear_entered(const Layer &layer, const Step &step) {
    const Block &block = *layer.block;
    const int64_t size = step.block_size * 2 * block.num_kv_heads * block.head_dim;
    for (int64_t i = 0; i < step.num_entered; i++)
        memset(layer.cache + step.entered[i] * size, 0, size * sizeof(bfloat16));
}

void attend(bfloat16 *out, const bfloat16 *heads, const Layer &layer, const Step &step,
            int64_t num_threads) {
    const Block &block = *layer.block;
    const View &view = step.views[layer.view];
    const int64_t stride = block.qkv.num_outputs, out_stride = block.num_heads * block.head_dim;
    for (const Group *group = view.groups; group < view.groups + view.num_groups; group++)
        paged_decode_bfloat16(
            out + group->first_row * out_stride, heads + group->first_row * stride, layer.cache,
            group->blocks, group->mask, group->num_sequences, stride, group->num_blocks,
            step.block_size, block.num_kv_heads, block.num_heads / block.num_kv_heads,
            block.head_dim, group->keep_start, group->keep_stop, group->mask_strides[0],
            group->mask_strides[1], group->mask_strides[2], (float)layer.scale, num_threads);
}

} // namespace

// x [T, hidden], in place. `scratch` [T, qkv outputs + heads * head_dim + 3 * hidden + 3 *
// intermediate].
extern "C" void decode_layers(const Layer *layers, int64_t num_layers, const Step *step,
                              bfloat16 *x, bfloat16 *scratch, int64_t num_threads) {
    const Block &shape = *layers->block;
    const int64_t num_rows = step->num_rows, size = num_rows * shape.down.num_outputs;
    bfloat16 *heads = scratch, *attended = heads + num_rows * shape.qkv.num_outputs;
    bfloat16 *now = x, *next = attended + num_rows * shape.num_heads * shape.head_dim;
    bfloat16 *rest = next + size;
    for (int64_t i = 0; i < num_layers; i++) {
        const Layer &layer = layers[i];
        clear_entered(layer, *step);
        block_before_attention(layer.block, heads, now, step->cos, step->sin, layer.cache,
                               step->cache_rows, rest, num_rows, num_threads);
        attend(attended, heads, layer, *step, num_threads);
        block_after_attention(layer.block, next, now, attended, rest, num_rows, num_threads);
        bfloat16 *other = now;
        now = next, next = other;
    }
    if (now != x)
        memcpy(x, now, size * sizeof(bfloat16));
}
#endif
