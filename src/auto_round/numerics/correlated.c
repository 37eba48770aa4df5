/* Errors and sums of groups of weights whose inputs are related, for a scale that a search tries: what
 * `CorrelatedBand` of band.py computes, in one pass over the weights and half of its products.
 *
 * The matrix P of mean products is symmetric, so that e P e needs one half of it. Weights lie in tiles of ROWS
 * rows, [pieces, tiles, piece, ROWS]: neighbouring rows are the elements of vectors, and a tile with its products
 * stays in the nearest caches. Sums run in another order than PyTorch's, and products may be fused with them.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* ROWS and PIECE, the largest piece, are set by `compiled_correlated.py`. */
#ifdef __AVX512F__
#define LANES 16
#define AT_ONCE 8 /* channels whose sums fill the registers, with all rows of a tile */
#else
#define LANES 8
#define AT_ONCE 2
#endif
#define VECTORS (ROWS / LANES)
#define INLINED static inline __attribute__((always_inline))
#define EACH_TILE(b, c, t)                                                                               \
    _Pragma("omp parallel for collapse(2) num_threads(b->threads) if (b->threads > 1) schedule(static)") \
    for (int64_t c = 0; c < b->pieces; c++)                                                              \
        for (int64_t t = 0; t < b->tiles; t++)

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef Vector Row[VECTORS]; /* a channel of the rows of a tile */

typedef struct {
    const float *w;                   /* [pieces, tiles, piece, ROWS] */
    const float *products;            /* [pieces, piece, piece] */
    const float *each;                /* [pieces, piece], sums of the rows of products; for sums only */
    const float *step, *zero, *floor; /* [groups, rows]; zero and floor may be null */
    float lo, hi;                     /* ends of the grid */
    int64_t pieces, per_group, tiles, piece, rows;
    int threads;
} Band;

/* What the rows of a tile do to each weight. */
typedef struct {
    float step[ROWS], inverse[ROWS], shift[ROWS], zero[ROWS];
} Scales;

static Scales scales(const Band *b, int64_t c, int64_t t) {
    Scales s;
    for (int64_t r = 0; r < ROWS; r++) {
        const int64_t row = t * ROWS + r < b->rows ? t * ROWS + r : b->rows - 1;
        const int64_t i = c / b->per_group * b->rows + row;
        s.step[r] = b->step[i];
        s.inverse[r] = 1.0f / b->step[i];
        s.shift[r] = b->floor ? b->floor[i] * s.inverse[r] : 0.0f;
        s.zero[r] = b->zero ? b->zero[i] : 0.0f;
    }
    return s;
}

INLINED float number(const Band *b, float u, float zero) {
    float n = rintf(u) + zero;
    n = n < b->lo ? b->lo : n;
    n = n > b->hi ? b->hi : n;
    return n - zero;
}

static const float *tile_of(const Band *b, int64_t c, int64_t t) {
    return b->w + (c * b->tiles + t) * b->piece * ROWS;
}

INLINED void put(const Row x, float *out) {
    for (int v = 0; v < VECTORS; v++) {
        for (int l = 0; l < LANES; l++) out[v * LANES + l] = x[v][l];
    }
}

/* AT_ONCE channels of x P, of `count` channels of x each of which counts `times`. */
INLINED void add_products(const float *p, int64_t piece, const Row *x, int64_t count, float times, Row *sum) {
    for (int64_t k = 0; k < count; k++, p += piece) {
        for (int v = 0; v < VECTORS; v++) {
            const Vector here = x[k][v] * times;
            for (int j = 0; j < AT_ONCE; j++) sum[j][v] += p[j] * here;
        }
    }
}

/* x P x for each row: channels before the ones at hand stand for the other half of the products too. */
INLINED void squares(const float *products, int64_t piece, const Row *x, float *out) {
    Row total = {0};
    for (int64_t first = 0; first < piece; first += AT_ONCE) {
        Row sum[AT_ONCE] = {0};
        add_products(products + first, piece, x, first, 2.0f, sum);
        add_products(products + first * piece + first, piece, x + first, AT_ONCE, 1.0f, sum);
        for (int j = 0; j < AT_ONCE; j++) {
            for (int v = 0; v < VECTORS; v++) total[v] += sum[j][v] * x[first + j][v];
        }
    }
    put(total, out);
}

/* x P x and x P y for each row; y is [piece, ROWS]. */
INLINED void both(const float *products, int64_t piece, const Row *x, const float *y, float *square, float *other) {
    Row total = {0}, along = {0};
    for (int64_t first = 0; first < piece; first += AT_ONCE) {
        Row sum[AT_ONCE] = {0};
        add_products(products + first, piece, x, piece, 1.0f, sum);
        for (int j = 0; j < AT_ONCE; j++) {
            for (int v = 0; v < VECTORS; v++) {
                Vector with;
                memcpy(&with, y + (first + j) * ROWS + v * LANES, sizeof with);
                total[v] += sum[j][v] * x[first + j][v];
                along[v] += sum[j][v] * with;
            }
        }
    }
    put(total, square);
    put(along, other);
}

static int64_t rows_of(const Band *b, int64_t t) {
    return b->rows - t * ROWS < ROWS ? b->rows - t * ROWS : ROWS;
}

/* out: [pieces, rows], e P e of the errors of each piece */
void auto_round_correlated_errors(const Band *b, float *out) {
    EACH_TILE(b, c, t) {
        const Scales s = scales(b, c, t);
        const float *w = tile_of(b, c, t);
        Row error[PIECE];
        float square[ROWS];
        for (int64_t k = 0; k < b->piece; k++) {
            float *e = (float *)error[k];
            for (int r = 0; r < ROWS; r++) {
                const float u = w[k * ROWS + r] * s.inverse[r] + s.shift[r];
                e[r] = u - number(b, u, s.zero[r]);
            }
        }
        squares(b->products + c * b->piece * b->piece, b->piece, error, square);
        const int64_t count = rows_of(b, t);
        for (int r = 0; r < count; r++) out[c * b->rows + t * ROWS + r] = square[r] * (s.step[r] * s.step[r]);
    }
}

/* n, nn, nw: [pieces, rows], sums of n P, n P n, n P w, with n the numbers of the weights w */
void auto_round_correlated_moments(const Band *b, float *n, float *nn, float *nw) {
    EACH_TILE(b, c, t) {
        const Scales s = scales(b, c, t);
        const float *w = tile_of(b, c, t);
        Row numbers[PIECE];
        float square[ROWS], along[ROWS], alone[ROWS] = {0};
        for (int64_t k = 0; k < b->piece; k++) {
            float *here = (float *)numbers[k];
            const float each = b->each[c * b->piece + k];
            for (int r = 0; r < ROWS; r++) {
                here[r] = number(b, w[k * ROWS + r] * s.inverse[r] + s.shift[r], s.zero[r]);
                alone[r] += here[r] * each;
            }
        }
        both(b->products + c * b->piece * b->piece, b->piece, numbers, w, square, along);
        const int64_t count = rows_of(b, t);
        for (int r = 0; r < count; r++) {
            const int64_t i = c * b->rows + t * ROWS + r;
            n[i] = alone[r], nn[i] = square[r], nw[i] = along[r];
        }
    }
}
