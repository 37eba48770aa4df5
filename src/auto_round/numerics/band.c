/* Errors and sums of groups of weights for a scale that a search tries: what `Band` of band.py computes, in one
 * pass over the weights instead of eight. Numbers are rounded as by `IntGrid.snap`: to nearest, ties to even,
 * then the zero point, then saturation.
 *
 * Weights lie in tiles of 16 groups, [n_tiles, width, 16], so that neighbouring groups become the elements of
 * one vector. Sums run as in `fold` of band.py, so that both give the same bits for groups of up to 128.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* LANES, groups in a tile, is set by `compiled_band.py`. */
#define PLACES 128 /* weights of a group whose costs are kept before they are added up */
#define EACH_TILE(b) _Pragma("omp parallel for num_threads(b->threads) if (b->threads > 1) schedule(static)")

typedef float Lanes[LANES];

typedef struct {
    const float *w;          /* [n_tiles, width, LANES] */
    const float *importance; /* [width, period + LANES]: that of the groups of a row, begun again at its end */
    const float *step, *zero, *floor; /* [n_groups]; zero and floor may be null */
    const float *along; /* [n_groups], what the square of sum(importance * error * w) counts; null for nothing */
    float lo, hi;
    int64_t n_groups, period, width;
    int threads;
} Band;

/* What a tile's groups do to each weight. */
typedef struct {
    Lanes step, inverse, shift, zero;
} Scales;

static Scales scales(const Band *b, int64_t first) {
    Scales s;
    for (int j = 0; j < LANES; j++) {
        const int64_t i = first + j < b->n_groups ? first + j : first;
        s.step[j] = b->step[i];
        s.inverse[j] = 1.0f / b->step[i];
        s.shift[j] = b->floor ? b->floor[i] * s.inverse[j] : 0.0f;
        s.zero[j] = b->zero ? b->zero[i] : 0.0f;
    }
    return s;
}

static inline float number(const Band *b, float u, float zero) {
    float n = rintf(u) + zero;
    n = n < b->lo ? b->lo : n;
    n = n > b->hi ? b->hi : n;
    return n - zero;
}

/* Sum over places, pair by pair; `x` is overwritten. */
static void fold(Lanes *x, int64_t length) {
    while (length > 1) {
        const int64_t half = length / 2, rest = length - half;
        for (int64_t k = 0; k < half; k++) {
            for (int j = 0; j < LANES; j++) x[k][j] += x[rest + k][j];
        }
        length = rest;
    }
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define KINDS 3 /* sums that are asked for together, at most */
#define INLINED static inline __attribute__((always_inline))

/* What one weight adds to each sum. */
typedef void Costs(const Band *b, const Scales *s, int lane, float w, float importance, float *cost);

/* Sums over the weights of each group of a tile. */
INLINED void add_up(const Band *b, const Scales *s, int64_t first, int kinds, Costs costs_of, Lanes *sums) {
    const float *w = b->w + first * b->width, *importance = b->importance + first % b->period;
    Lanes costs[KINDS][PLACES];
    for (int m = 0; m < kinds; m++) memset(sums[m], 0, sizeof(Lanes));
    for (int64_t start = 0; start < b->width; start += PLACES) {
        const int64_t places = least(PLACES, b->width - start);
        for (int64_t k = 0; k < places; k++) {
            const float *here = w + (start + k) * LANES;
            const float *weigh = importance + (start + k) * (b->period + LANES);
            for (int j = 0; j < LANES; j++) {
                float cost[KINDS];
                costs_of(b, s, j, here[j], weigh[j], cost);
                for (int m = 0; m < kinds; m++) costs[m][k][j] = cost[m];
            }
        }
        for (int m = 0; m < kinds; m++) {
            fold(costs[m], places);
            for (int j = 0; j < LANES; j++) sums[m][j] += costs[m][0][j];
        }
    }
}

INLINED void error_costs(const Band *b, const Scales *s, int lane, float w, float importance, float *cost) {
    const float u = w * s->inverse[lane] + s->shift[lane];
    const float off = u - number(b, u, s->zero[lane]);
    cost[0] = off * off * importance;
    cost[1] = off * w * importance;
}

INLINED void moment_costs(const Band *b, const Scales *s, int lane, float w, float importance, float *cost) {
    const float found = number(b, w * s->inverse[lane] + s->shift[lane], s->zero[lane]);
    const float weighted = found * importance;
    cost[0] = weighted;
    cost[1] = weighted * found;
    cost[2] = weighted * w;
}

/* out: [n_groups], sum of importance * (w - rounded w)^2, and what the errors along the weights cost */
void auto_round_errors(const Band *b, float *out) {
    EACH_TILE(b)
    for (int64_t first = 0; first < b->n_groups; first += LANES) {
        const Scales s = scales(b, first);
        Lanes sums[2];
        if (b->along) add_up(b, &s, first, 2, error_costs, sums);
        else add_up(b, &s, first, 1, error_costs, sums);
        const int64_t count = least(LANES, b->n_groups - first);
        for (int j = 0; j < count; j++) {
            const float along = b->along ? b->along[first + j] * (sums[1][j] * sums[1][j]) : 0.0f;
            out[first + j] = (sums[0][j] + along) * (s.step[j] * s.step[j]);
        }
    }
}

/* n, nn, nw: [n_groups], sums of importance times n, n * n, n * w, with n the number of a weight w */
void auto_round_moments(const Band *b, float *n, float *nn, float *nw) {
    EACH_TILE(b)
    for (int64_t first = 0; first < b->n_groups; first += LANES) {
        const Scales s = scales(b, first);
        Lanes sums[3];
        add_up(b, &s, first, 3, moment_costs, sums);
        const int64_t count = least(LANES, b->n_groups - first);
        for (int j = 0; j < count; j++) {
            n[first + j] = sums[0][j];
            nn[first + j] = sums[1][j];
            nw[first + j] = sums[2][j];
        }
    }
}
