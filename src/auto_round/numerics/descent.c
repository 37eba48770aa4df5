/* Coordinate descent over the numbers of weights, `TOGETHER` channels at a time: what `descent.py` does with a
 * dozen operations of PyTorch for each channel, in one pass over memory for all of them. Each operation is rounded
 * as there, in the same order, so that all numbers are the same bits.
 *
 * Everything is [tiles, TILE, rows]: the weights of a channel lie side by side.
 */

#include <math.h>
#include <stdint.h>

/* TILE and TOGETHER are set by `compiled_descent.py`. */
#define ROWS 64 /* at a time: their slopes stay in the nearest cache */

typedef struct {
    const float *products; /* [tiles, TILE, TILE] */
    const float *step, *u, *zero; /* zero may be null */
    float *error, *slope;
    float lo, hi; /* ends of the grid */
    int64_t tiles, rows;
    int threads;
} Band;

/* PyTorch adds a product to a sum in one instruction where processors have it. */
static inline float plus_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

/* The best number of one channel for some rows; `change` is what their errors grow by. */
static inline void improve(const Band *b, int64_t at, float diagonal, int64_t count, float *restrict change) {
    const float *restrict step = b->step + at, *restrict u = b->u + at, *restrict slope = b->slope + at;
    const float *restrict zero = b->zero ? b->zero + at : 0;
    float *restrict error = b->error + at;
    for (int64_t r = 0; r < count; r++) {
        const float shift = zero ? zero[r] : 0.0f;
        float n = rintf((error[r] - slope[r] / diagonal) / step[r] + u[r]) + (zero ? shift : -0.0f);
        n = n < b->lo ? b->lo : n;
        n = (n > b->hi ? b->hi : n) - shift;
        change[r] = (n - u[r]) * step[r] - error[r];
    }
}

/* Channels start ... start + TOGETHER - 1; `changed` [tiles, TOGETHER, rows] is what errors grew by. */
void auto_round_improve(const Band *b, int64_t start, float *changed) {
    const int64_t rows = b->rows, pieces = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(b->threads) if (b->threads > 1) schedule(static)
    for (int64_t piece = 0; piece < b->tiles * pieces; piece++) {
        const int64_t tile = piece / pieces, first = piece % pieces * ROWS;
        const int64_t count = rows - first < ROWS ? rows - first : ROWS;
        const int64_t corner = (tile * TILE + start) * rows + first;
        const float *products = b->products + (tile * TILE + start) * TILE + start;
        float change[ROWS];
        for (int64_t j = 0; j < TOGETHER; j++) {
            float *restrict error = b->error + corner + j * rows;
            float *restrict out = changed + (tile * TOGETHER + j) * rows + first;
            improve(b, corner + j * rows, products[j * TILE + j], count, change);
            for (int64_t i = 0; i < TOGETHER; i++) {
                float *restrict slope = b->slope + corner + i * rows;
                const float product = products[i * TILE + j];
                for (int64_t r = 0; r < count; r++) slope[r] = plus_product(slope[r], product, change[r]);
            }
            for (int64_t r = 0; r < count; r++) {
                const float before = error[r];
                error[r] = before + change[r];
                out[r] = error[r] - before;
            }
        }
    }
}
