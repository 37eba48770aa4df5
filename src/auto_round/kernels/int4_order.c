/* Codes of 4 bits in the order in which PyTorch packs int4 matrices: the bytes of `Order.pack`, each written once.
 *
 * A packed matrix is a row of blocks, each of `block` outputs and all inputs; every byte holds the codes of two
 * outputs of the block for the same input.
 */

#include <stdint.h>

#define MOST 64  /* outputs in the largest block */
#define PIECE 64 /* inputs at a time: their codes are a line of the cache for each output */

void auto_round_order_int4(
    const uint8_t *codes,                   /* [rows, n_in] */
    const int64_t *low, const int64_t *high, /* output in the block of each byte's halves, [block / 2] */
    int64_t rows, int64_t n_in, int64_t block, uint8_t *packed, int threads
) {
    const int64_t half = block / 2;
    _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")
    for (int64_t first = 0; first < rows; first += block) {
        uint8_t *to = packed + first * n_in / 2;
        const uint8_t *lows[MOST / 2], *highs[MOST / 2];
        for (int64_t j = 0; j < half; j++) {
            lows[j] = codes + (first + low[j]) * n_in;
            highs[j] = codes + (first + high[j]) * n_in;
        }
        for (int64_t start = 0; start < n_in; start += PIECE) {
            const int64_t end = start + PIECE < n_in ? start + PIECE : n_in;
            for (int64_t j = 0; j < half; j++)
                for (int64_t i = start; i < end; i++) to[i * half + j] = (uint8_t)(lows[j][i] | highs[j][i] << 4);
        }
    }
}
