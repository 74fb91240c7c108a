// Logits of tokens that may not come next become -infinite.
#include "parallel.h"
#include "vector.h"

// For rows of logits [T, size] by number: bits [num_rows, num_words] have a one for every token that
// may stay, the lowest bit first; tokens beyond them may not.
extern "C" void keep_tokens_float32(float *logits, const int64_t *rows, const uint32_t *bits,
                                    int64_t num_rows, int64_t num_words, int64_t size,
                                    int64_t stride, int64_t num_threads) {
    for_each(num_threads, num_rows, num_rows * size > 1 << 15, [=](int64_t row) {
        float *numbers = logits + rows[row] * stride;
        const uint32_t *words = bits + row * num_words;
        const Lanes dropped = all(-__builtin_inff());
        Bits bit;
        for (int64_t i = 0; i < LANES; i++)
            bit[i] = 1u << i;
        const int64_t num_known = size < num_words * 32 ? size : num_words * 32;
        int64_t c = 0;
        for (; c + LANES <= num_known; c += LANES) {
            const Bits word = (Bits){} + (words[c / 32] >> c % 32);
            store(numbers + c, (word & bit) != 0 ? load(numbers + c) : dropped);
        }
        for (; c < size; c++)
            if (c >= num_known || !(words[c / 32] >> c % 32 & 1))
                numbers[c] = -__builtin_inff();
    });
}
