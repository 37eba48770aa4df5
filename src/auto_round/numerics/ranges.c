/* Smallest and largest weight of each group, in one pass over memory: those of `Format.stats`.
 *
 * Floats are compared as whole numbers of the same order: bits as they are, those below the sign turned over where
 * it is set. So numbers that are not finite lie beyond all others, and need no look of their own.
 */

#include <stdint.h>

/* KEY: bits of a float as a whole number in its order, and back, since turning over twice changes nothing. */
#define KEY(INT, x) ((INT)((x) ^ (INT)((INT)((x) >> (8 * sizeof(INT) - 1)) & (INT)MOST_##INT)))
#define MOST_int16_t 0x7FFF
#define MOST_int32_t 0x7FFFFFFF

/* `weights` [rows, length]; `lo` and `hi` [rows, groups of a row], in the dtype of weights. */
#define RANGES(NAME, INT)                                                                              \
    void NAME(const INT *weights, INT *lo, INT *hi, int64_t rows, int64_t length, int64_t width, int threads) { \
        const int64_t groups = (length + width - 1) / width;                                           \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")             \
        for (int64_t row = 0; row < rows; row++) {                                                     \
            for (int64_t g = 0; g < groups; g++) {                                                     \
                const int64_t end = g * width + width < length ? g * width + width : length;           \
                const INT *w = weights + row * length;                                                 \
                INT least = MOST_##INT, most = (INT)~MOST_##INT;                                       \
                for (int64_t i = g * width; i < end; i++) {                                            \
                    const INT key = KEY(INT, w[i]);                                                    \
                    least = key < least ? key : least;                                                 \
                    most = key > most ? key : most;                                                    \
                }                                                                                      \
                lo[row * groups + g] = KEY(INT, least);                                                \
                hi[row * groups + g] = KEY(INT, most);                                                 \
            }                                                                                          \
        }                                                                                              \
    }

RANGES(auto_round_ranges_bfloat16, int16_t)
RANGES(auto_round_ranges_float32, int32_t)
