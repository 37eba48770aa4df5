/* Weights rounded to grids of whole numbers, and the gradients of that, in one pass over memory: what `Format`
 * computes with a dozen operations of PyTorch. Each operation is rounded as there, in the same order, so that all
 * numbers are the same bits; `compiled_rounding.py` compiles this without fused products for that reason.
 *
 * A matrix is [rows, length]; groups are pieces of `width` weights of a row, the last one may be shorter.
 */

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define INLINED static inline __attribute__((always_inline))
#define EACH_ROW(m) _Pragma("omp parallel for num_threads(m->threads) if (m->threads > 1) schedule(static)")

typedef struct {
    const void *w;                    /* float32, or bfloat16 where `half` */
    const float *v;                   /* rounding offsets; may be null */
    const float *step, *zero, *floor; /* [rows, groups of a row]; zero and floor may be null */
    float lo, hi;                     /* ends of the grid */
    int64_t rows, length, width;
    int half, threads;
} Matrix;

/* One group of a row, and what its weights have in common. Where there is no zero point or floor, what is
 * added and subtracted leaves every number as it is, signs of zeros too. */
typedef struct {
    const float *wide;
    const uint16_t *narrow;
    const float *v;
    float step, add_zero, take_zero, add_floor, take_floor, lo, hi, below, above;
    int64_t at, count;
} Group;

static Group group_of(const Matrix *m, int64_t row, int64_t start) {
    const int64_t i = row * ((m->length + m->width - 1) / m->width) + start / m->width;
    Group g;
    g.at = row * m->length + start;
    g.count = m->length - start < m->width ? m->length - start : m->width;
    g.wide = (const float *)m->w + (m->half ? 0 : g.at);
    g.narrow = (const uint16_t *)m->w + (m->half ? g.at : 0);
    g.v = m->v ? m->v + g.at : 0;
    g.step = m->step[i];
    g.add_zero = m->zero ? m->zero[i] : -0.0f;
    g.take_zero = m->zero ? m->zero[i] : 0.0f;
    g.add_floor = m->floor ? m->floor[i] : -0.0f;
    g.take_floor = m->floor ? m->floor[i] : 0.0f;
    g.lo = m->lo, g.hi = m->hi;
    g.below = m->lo - 0.5f, g.above = m->hi + 0.5f;
    return g;
}

INLINED float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A weight in steps: `u` as it is, and moved by its offset. */
INLINED float in_steps(const Group *g, bool half, int64_t i) {
    return ((half ? widened(g->narrow[i]) : g->wide[i]) + g->add_floor) / g->step;
}

INLINED float moved(const Group *g, bool offset, float u, int64_t i) { return offset ? u + g->v[i] : u; }

/* Nearest number of the grid, the zero point in it. */
INLINED float snapped(const Group *g, float u) {
    float n = rintf(u) + g->add_zero;
    n = n < g->lo ? g->lo : n;
    return n > g->hi ? g->hi : n;
}

/* `work(group, half, offset, ...)` for each group; what is known of all groups is known to the compiler. */
#define EACH_GROUP(m, work, ...)                                                                     \
    EACH_ROW(m)                                                                                      \
    for (int64_t row = 0; row < m->rows; row++) {                                                    \
        for (int64_t start = 0; start < m->length; start += m->width) {                              \
            const Group g = group_of(m, row, start);                                                 \
            if (m->half && m->v) work(&g, true, true, __VA_ARGS__);                                  \
            else if (m->half) work(&g, true, false, __VA_ARGS__);                                    \
            else if (m->v) work(&g, false, true, __VA_ARGS__);                                       \
            else work(&g, false, false, __VA_ARGS__);                                                \
        }                                                                                            \
    }

INLINED void encode(const Group *g, bool half, bool offset, uint8_t *codes) {
    for (int64_t i = 0; i < g->count; i++) {
        const float n = snapped(g, moved(g, offset, in_steps(g, half, i), i));
        codes[g->at + i] = (uint8_t)(int32_t)(n - g->lo);
    }
}

INLINED void round_to(const Group *g, bool half, bool offset, float *out) {
    for (int64_t i = 0; i < g->count; i++) {
        const float n = snapped(g, moved(g, offset, in_steps(g, half, i), i)) - g->take_zero;
        out[g->at + i] = n * g->step - g->take_floor;
    }
}

/* From the gradient of the rounded weights: what the groups' sums are of, and offsets or their gradient. */
INLINED void differentiate(
    const Group *g, bool half, bool offset, const float *grad, float *to_step, float *to_zero, float *to_v
) {
    for (int64_t i = 0; i < g->count; i++) {
        const float u = in_steps(g, half, i), to = moved(g, offset, u, i), x = grad[g->at + i];
        const float place = to + g->add_zero;
        const float inside = (place < g->below) | (place > g->above) ? 0.0f : 1.0f;
        const float kept = x * inside;
        if (to_v) to_v[g->at + i] = kept * g->step;
        if (to_zero) to_zero[g->at + i] = kept - x;
        if (to_step) to_step[g->at + i] = x * (snapped(g, to) - g->take_zero - u * inside);
    }
}

void auto_round_encode(const Matrix *m, uint8_t *codes) { EACH_GROUP(m, encode, codes) }

void auto_round_round(const Matrix *m, float *out) { EACH_GROUP(m, round_to, out) }

void auto_round_differentiate(const Matrix *m, const float *grad, float *to_step, float *to_zero, float *to_v) {
    EACH_GROUP(m, differentiate, grad, to_step, to_zero, to_v)
}
