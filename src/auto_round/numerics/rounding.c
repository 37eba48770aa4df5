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

/* LANES, what PyTorch adds side by side, is set by `compiled_rounding.py`. */
#define WIDE (4 * LANES) /* four vectors at a time */
#define STEP 16          /* of these until they are carried on */
#define LEVELS 4
#define PIECE (STEP * WIDE)
#define AHEAD 4096 /* weights; 1024 and 2048 take a tenth longer, none twice as long (docs/LOG.md) */
#define LINE 64    /* bytes that are fetched together */

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
    int64_t number, at, count, width;
} Group;

/* What comes of the gradient of rounded weights; what is null is not wanted. Sums are those of groups. */
typedef struct {
    const void *grad;            /* float32, or bfloat16 where `half` */
    float *to_step, *to_outside; /* [rows, groups of a row] */
    float *to_v;                 /* gradient of the offsets, or */
    float *v, move;              /* offsets, each moved so far against the sign of its gradient */
    int half, held;              /* held: steps and floors change, codes do not follow them */
} Slopes;

/* A sum in PyTorch's order: columns of WIDE numbers, each carried on after every STEP, STEP * STEP, ... numbers.
 * Source: ATen/native/cpu/SumKernel.cpp, cascade sum. */
typedef struct {
    float level[LEVELS][WIDE];
    int64_t done;
} Sum;

static int64_t groups_of(const Matrix *m) { return (m->length + m->width - 1) / m->width; }

/* The group `place` of the `groups` of a row. */
INLINED Group group_of(const Matrix *m, int64_t row, int64_t place, int64_t groups) {
    const int64_t i = row * groups + place, start = place * m->width;
    Group g;
    g.number = i, g.width = m->width;
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

/* Symmetric formats have neither: as the compiler then knows, nothing is added and subtracted. */
static bool has_steps_alone(const Matrix *m) { return !m->zero && !m->floor; }

INLINED Group with_step_alone(Group g) {
    g.add_zero = g.add_floor = -0.0f;
    g.take_zero = g.take_floor = 0.0f;
    return g;
}

INLINED float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* To the nearest, ties to even, as PyTorch does; no NaN is handed over. */
INLINED uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* A weight in steps: `u` as it is, and moved by its offset. */
INLINED float in_steps(const Group *g, bool half, int64_t i) {
    return ((half ? widened(g->narrow[i]) : g->wide[i]) + g->add_floor) / g->step;
}

INLINED float moved(const Group *g, bool offset, float u, int64_t i) { return offset ? u + g->v[i] : u; }

/* Fetch what lies AHEAD of a group: processors do not see far enough ahead where each weight takes so little. */
INLINED void fetch_ahead(const Matrix *m, const Group *g) {
    const char *w = m->half ? (const char *)(g->narrow + AHEAD) : (const char *)(g->wide + AHEAD);
    for (int64_t i = 0; i < g->count * (m->half ? 2 : 4); i += LINE) __builtin_prefetch(w + i);
    const char *v = (const char *)(g->v + AHEAD);
    for (int64_t i = 0; m->v && i < g->count * 4; i += LINE) __builtin_prefetch(v + i);
}

/* Nearest number of the grid, the zero point in it. */
INLINED float snapped(const Group *g, float u) {
    float n = rintf(u) + g->add_zero;
    n = n < g->lo ? g->lo : n;
    return n > g->hi ? g->hi : n;
}

/* `work(group, half, offset, ...)` for each group; what is known of all groups is known to the compiler. */
#define EACH_GROUP(m, work, ...)                                                                     \
    const int64_t groups = groups_of(m);                                                             \
    EACH_ROW(m)                                                                                      \
    for (int64_t row = 0; row < m->rows; row++) {                                                    \
        for (int64_t place = 0; place < groups; place++) {                                           \
            const Group g = group_of(m, row, place, groups);                                         \
            fetch_ahead(m, &g);                                                                      \
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

INLINED float rounded(const Group *g, bool half, bool offset, int64_t i) {
    const float n = snapped(g, moved(g, offset, in_steps(g, half, i), i)) - g->take_zero;
    return n * g->step - g->take_floor;
}

INLINED void round_to(const Group *g, bool half, bool offset, float *out) {
    for (int64_t i = 0; i < g->count; i++) out[g->at + i] = rounded(g, half, offset, i);
}

INLINED void round_to_half(const Group *g, bool half, bool offset, uint16_t *out) {
    for (int64_t i = 0; i < g->count; i++) out[g->at + i] = narrowed(rounded(g, half, offset, i));
}

INLINED void add(float *to, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += x[i];
}

INLINED void zero(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] = 0;
}

/* A sum of `count` numbers: few of them fill no level but the first. */
INLINED void begin(Sum *sum, int64_t count) {
    zero(sum->level[0], WIDE);
    for (int level = 1; count >= PIECE && level < LEVELS; level++) zero(sum->level[level], WIDE);
    sum->done = 0;
}

/* The next PIECE numbers of a sum; fewer are the last ones. */
INLINED void add_piece(Sum *sum, const float *x, int64_t count) {
    for (int64_t at = 0; at + WIDE <= count; at += WIDE) add(sum->level[0], x + at, WIDE);
    if (count < PIECE) return;
    sum->done += STEP;
    int64_t full = STEP;
    for (int level = 1; level < LEVELS; level++, full *= STEP) {
        add(sum->level[level], sum->level[level - 1], WIDE);
        zero(sum->level[level - 1], WIDE);
        if (sum->done % (full * STEP)) break;
    }
}

/* The sum, once what does not fill WIDE is added. */
INLINED float sum_with(Sum *sum, const float *x, int64_t count) {
    float *const total = sum->level[0], rest = 0;
    for (int level = 1; sum->done && level < LEVELS; level++) add(total, sum->level[level], WIDE);
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) add(total, x + at, LANES);
    for (int column = 1; column < 4; column++) add(total, total + column * LANES, LANES);
    for (; at < count; at++) rest += x[at];
    for (int lane = 0; lane < LANES; lane++) rest += total[lane];
    return rest;
}

/* Straight-through gradients of one group, piece by piece; a short group is filled up with zeros.
 *
 * half_grad: of what kind the gradient is; moves: offsets are moved against its signs; outside: that is wanted;
 * rounds: weights go to `out`, rounded with the offsets as they were. All but the last are constants.
 */
INLINED void differentiate(
    const Group *g, bool half, bool offset, const Slopes *s, bool half_grad, bool moves, bool outside, bool rounds,
    uint16_t *out) {
    if (moves && !offset) return; /* what does not exist is not moved: never asked for, and not compiled */
    const float *wide = (const float *)s->grad + (half_grad ? 0 : g->at);
    const uint16_t *narrow = (const uint16_t *)s->grad + (half_grad ? g->at : 0);
    float *const v = moves ? s->v + g->at : 0;
    const float by = s->move;
    const bool follow = !s->held;
    float by_step[PIECE], by_outside[PIECE], by_offset[PIECE];
    Sum of_steps, of_outside;
    if (s->to_step) begin(&of_steps, g->width);
    if (outside) begin(&of_outside, g->width);
    for (int64_t start = 0; start < g->width; start += PIECE) {
        const int64_t left = g->width - start, size = left < PIECE ? left : PIECE;
        const int64_t held = g->count - start, there = held < 0 ? 0 : held < size ? held : size;
/* What is written lies apart from what is read, but for an offset's own place. */
#pragma GCC ivdep
        for (int64_t j = 0; j < there; j++) {
            const int64_t i = start + j;
            const float x = half_grad ? widened(narrow[i]) : wide[i], u = in_steps(g, half, i);
            const float to = moves ? u + v[i] : moved(g, offset, u, i), place = to + g->add_zero;
            const float inside = (place < g->below) | (place > g->above) ? 0.0f : 1.0f;
            const float kept = x * inside, slope = kept * g->step, n = snapped(g, to) - g->take_zero;
            by_step[j] = x * (n - (follow ? u * inside : 0.0f));
            if (rounds) out[g->at + i] = narrowed(n * g->step - g->take_floor);
            if (outside) by_outside[j] = (follow ? kept : 0.0f) - x;
            if (moves) v[i] -= by * ((slope > 0 ? 1.0f : 0.0f) - (slope < 0 ? 1.0f : 0.0f)); /* a signed step */
            else by_offset[j] = slope;
        }
        for (int64_t j = there; j < size; j++) by_step[j] = by_outside[j] = 0;
        if (!moves && s->to_v) memcpy(s->to_v + g->at + start, by_offset, (size_t)there * sizeof(float));
        if (s->to_step) add_piece(&of_steps, by_step, size);
        if (outside) add_piece(&of_outside, by_outside, size);
    }
    const int64_t rest = g->width % WIDE, from = g->width % PIECE - rest;
    if (s->to_step) s->to_step[g->number] = sum_with(&of_steps, by_step + from, rest);
    if (outside) s->to_outside[g->number] = sum_with(&of_outside, by_outside + from, rest);
}

void auto_round_encode(const Matrix *m, uint8_t *codes) { EACH_GROUP(m, encode, codes) }

void auto_round_round(const Matrix *m, float *out) { EACH_GROUP(m, round_to, out) }

void auto_round_round_to_half(const Matrix *m, uint16_t *out) { EACH_GROUP(m, round_to_half, out) }

/* All that is known of a call is known to the compiler: loops with branches in them are not vectorized. */
#define DIFFERENTIATE(half_grad, moves)                                                              \
    if (slopes->to_outside) { EACH_GROUP(m, differentiate, slopes, half_grad, moves, true, false, 0) }  \
    else { EACH_GROUP(m, differentiate, slopes, half_grad, moves, false, false, 0) }

void auto_round_differentiate(const Matrix *m, const Slopes *slopes) {
    if (slopes->v) {
        if (slopes->half) { DIFFERENTIATE(true, true) }
        else { DIFFERENTIATE(false, true) }
    } else {
        if (slopes->half) { DIFFERENTIATE(true, false) }
        else { DIFFERENTIATE(false, false) }
    }
}
