/* Coordinate descent over the numbers of weights, `TOGETHER` channels at a time: what `descent.py` does with a
 * dozen operations of PyTorch for each channel, in one pass over memory for all of them. Each operation is rounded
 * as there, in the same order, so that all numbers are the same bits.
 *
 * Everything is [tiles, TILE, rows]: the weights of a channel lie side by side.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

/* TILE and TOGETHER are set by `compiled_descent.py`. */
#define ROWS 64 /* at a time: their slopes stay in the nearest cache */
#ifdef __AVX512F__
#define LANES 16
#define CHANNELS 4 /* whose sums fill the registers, for VECTORS of rows each */
#else
#define LANES 8
#define CHANNELS 2
#endif
#define VECTORS 4

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float Anywhere __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

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

/* The same for vectors, said so that every sum stays in its register. */
static inline Vector plus_products(Vector sum, float a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)sum);
#else
    for (int l = 0; l < LANES; l++) sum[l] = plus_product(sum[l], a, b[l]);
    return sum;
#endif
}

/* Slopes of CHANNELS other channels follow what `TOGETHER` errors grew by; `rows` is from one to the next. */
static inline void follow(
    float *slope, int64_t rows, const float *products, const float (*changed)[ROWS], int64_t count) {
    float sums[CHANNELS][ROWS];
    for (int64_t part = 0; part < ROWS; part += VECTORS * LANES) {
        Vector sum[CHANNELS][VECTORS];
        for (int c = 0; c < CHANNELS; c++) {
            for (int v = 0; v < VECTORS; v++) sum[c][v] = (Vector){0};
        }
        for (int64_t j = 0; j < TOGETHER; j++) {
            const Anywhere *here = (const Anywhere *)(changed[j] + part);
            for (int c = 0; c < CHANNELS; c++) {
                for (int v = 0; v < VECTORS; v++) sum[c][v] = plus_products(sum[c][v], products[c * TILE + j], here[v]);
            }
        }
        for (int c = 0; c < CHANNELS; c++) {
            for (int v = 0; v < VECTORS; v++) ((Anywhere *)(sums[c] + part))[v] = sum[c][v];
        }
    }
    for (int c = 0; c < CHANNELS; c++) {
        for (int64_t r = 0; r < count; r++) slope[c * rows + r] += sums[c][r];
    }
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
            for (int64_t i = 0; i < TILE; i += CHANNELS) {
                if (i == start) i += TOGETHER;
                if (i == TILE) break;
                follow(slope + i * rows, rows, products + i * TILE + start, (const float (*)[ROWS])changed, count);
            }
        }
    }
}
