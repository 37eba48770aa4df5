/* Coordinate descent over the numbers of weights, `TOGETHER` channels at a time: what `descent.py` does with a
 * dozen operations of PyTorch for each channel, in one pass over memory for all of them. Each operation is rounded
 * as there, in the same order, so that all numbers are the same bits.
 *
 * Everything is [tiles, TILE, rows]: the weights of a channel lie side by side.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* `TOGETHER` channels from `start` on, one after the other; `changed` is what their errors grow by. */
static void improve_together(const Band *b, int64_t corner, const float *products, int64_t count, float (*changed)[ROWS]) {
    float change[ROWS];
    for (int64_t j = 0; j < TOGETHER; j++) {
        float *restrict error = b->error + corner + j * b->rows;
        improve(b, corner + j * b->rows, products[j * TILE + j], count, change);
        for (int64_t i = 0; i < TOGETHER; i++) {
            float *restrict slope = b->slope + corner + i * b->rows;
            const float product = products[i * TILE + j];
            for (int64_t r = 0; r < count; r++) slope[r] = plus_product(slope[r], product, change[r]);
        }
        for (int64_t r = 0; r < count; r++) {
            const float before = error[r];
            error[r] = before + change[r];
            changed[j][r] = error[r] - before;
        }
        for (int64_t r = count; r < ROWS; r++) changed[j][r] = 0;
    }
}

/* Slopes of two other channels follow what `TOGETHER` errors grew by. */
static inline void follow(
    float *first, float *second, const float *products, const float (*changed)[ROWS], int64_t count) {
    float sums[2][ROWS] = {0};
    for (int64_t part = 0; part < ROWS; part += ROWS / 2) { /* what registers hold */
        float one[ROWS / 2] = {0}, two[ROWS / 2] = {0};
        for (int64_t j = 0; j < TOGETHER; j++) {
            const float p = products[j], q = products[TILE + j];
            for (int64_t r = 0; r < ROWS / 2; r++) {
                one[r] = plus_product(one[r], p, changed[j][part + r]);
                two[r] = plus_product(two[r], q, changed[j][part + r]);
            }
        }
        memcpy(sums[0] + part, one, sizeof one);
        memcpy(sums[1] + part, two, sizeof two);
    }
    for (int64_t r = 0; r < count; r++) first[r] += sums[0][r];
    for (int64_t r = 0; r < count; r++) second[r] += sums[1][r];
}

/* Every channel before `stop` once. */
void auto_round_sweep(const Band *b, int64_t stop) {
    const int64_t rows = b->rows, pieces = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(b->threads) if (b->threads > 1) schedule(static)
    for (int64_t piece = 0; piece < b->tiles * pieces; piece++) {
        const int64_t tile = piece / pieces, first = piece % pieces * ROWS;
        const int64_t count = rows - first < ROWS ? rows - first : ROWS;
        const float *products = b->products + tile * TILE * TILE;
        float *slope = b->slope + tile * TILE * rows + first;
        for (int64_t start = 0; start < stop; start += TOGETHER) {
            float changed[TOGETHER][ROWS];
            improve_together(b, (tile * TILE + start) * rows + first, products + start * TILE + start, count, changed);
            for (int64_t i = 0; i < TILE; i += 2) {
                if (i == start) i += TOGETHER;
                if (i == TILE) break;
                float *two = slope + i * rows;
                follow(two, two + rows, products + i * TILE + start, (const float (*)[ROWS])changed, count);
            }
        }
    }
}
