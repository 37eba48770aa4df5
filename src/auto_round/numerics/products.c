/* Products of a rounded matrix with few tokens, in bfloat16: each row is rounded, multiplied and learned while it
 * is in a core's caches, and neither the rounded matrix nor its gradient ever is a tensor. Sums are float32.
 * How a row is rounded and learned stands in rounding.c, which is one library with this.
 */

#include "rounding.c"

#ifdef __AVX512F__
#include <immintrin.h>
#include <stdlib.h>

#define PRODUCTS __attribute__((target("avx512bf16")))
#define TOKENS 6    /* whose sums fill the registers, with those of ... */
#define TOGETHER 4  /* ... so many rows */
#define ROWS 32     /* that are learned at a time */
#define VECTOR 16   /* floats of a register */
#define APART 32    /* numbers between rows, which would fall into the same places of a cache otherwise */

/* What a matrix is multiplied by, and the gradient of the product; all bfloat16. */
typedef struct {
    const uint16_t *x;    /* [tokens, length] */
    const uint16_t *grad; /* [tokens, rows] */
    uint16_t *to_x;       /* [tokens, length]; null where it is not wanted */
    int64_t tokens;
} Products;

int auto_round_multiplies(void) { return __builtin_cpu_supports("avx512bf16"); }

INLINED __m512i of(const void *x) { return _mm512_loadu_si512(x); }

INLINED __m512 widened_all(__m256i halves) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }

/* The nearest numbers of a grid without a zero point. */
INLINED __m512 snapped_all(__m512 u, __m512 lo, __m512 hi) {
    const __m512 n = _mm512_roundscale_ps(u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_min_ps(hi, _mm512_max_ps(lo, n));
}

/* Weights of a symmetric matrix in steps. */
INLINED __m512 in_steps_all(const uint16_t *w, __m512 step) {
    return _mm512_div_ps(widened_all(_mm256_loadu_si256((const __m256i *)w)), step);
}

/* x[token] times some rows of a matrix, for `tokens` tokens. */
INLINED PRODUCTS void multiply_rows(
    const uint16_t *w, int64_t length, const uint16_t *x, const int tokens, uint16_t *out, int64_t stride) {
    __m512 sum[TOKENS][TOGETHER];
    for (int t = 0; t < tokens; t++) {
        for (int j = 0; j < TOGETHER; j++) sum[t][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < length; k += 32) {
        __m512bh row[TOGETHER];
        for (int j = 0; j < TOGETHER; j++) row[j] = (__m512bh)of(w + j * (length + APART) + k);
        for (int t = 0; t < tokens; t++) {
            const __m512bh token = (__m512bh)of(x + t * length + k);
            for (int j = 0; j < TOGETHER; j++) sum[t][j] = _mm512_dpbf16_ps(sum[t][j], token, row[j]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        for (int j = 0; j < TOGETHER; j++) out[t * stride + j] = narrowed(_mm512_reduce_add_ps(sum[t][j]));
    }
}

static __attribute__((noinline)) void round_row(const Matrix *m, int64_t row, uint16_t *out) {
    const int64_t groups = groups_of(m);
    for (int64_t place = 0; place < groups; place++) {
        const Group g = group_of(m, row, place, groups);
        uint16_t *const here = out - row * m->length;
        fetch_ahead(m, &g);
        if (m->half && m->v && has_steps_alone(m)) {
            const Group known = with_step_alone(g);
            round_to_half(&known, true, true, here);
        } else if (m->half && m->v) round_to_half(&g, true, true, here);
        else if (m->half) round_to_half(&g, true, false, here);
        else if (m->v) round_to_half(&g, false, true, here);
        else round_to_half(&g, false, false, here);
    }
}

/* out: [tokens, rows], x times the transposed rounded matrix; rows are a multiple of TOGETHER, the length of 32 */
PRODUCTS void auto_round_multiply(const Matrix *m, const uint16_t *x, int64_t tokens, uint16_t *out) {
    EACH_ROW(m)
    for (int64_t row = 0; row < m->rows; row += TOGETHER) {
        uint16_t w[TOGETHER * (m->length + APART)];
        for (int j = 0; j < TOGETHER; j++) round_row(m, row + j, w + j * (m->length + APART));
        for (int64_t t = 0; t < tokens; t += TOKENS) {
            const uint16_t *here = x + t * m->length;
            uint16_t *to = out + t * m->rows + row;
            switch (tokens - t) {
            case 1: multiply_rows(w, m->length, here, 1, to, m->rows); break;
            case 2: multiply_rows(w, m->length, here, 2, to, m->rows); break;
            case 3: multiply_rows(w, m->length, here, 3, to, m->rows); break;
            case 4: multiply_rows(w, m->length, here, 4, to, m->rows); break;
            case 5: multiply_rows(w, m->length, here, 5, to, m->rows); break;
            default: multiply_rows(w, m->length, here, TOKENS, to, m->rows);
            }
        }
    }
}

/* Some columns of a matrix while they are learned. Pairs are what one instruction multiplies and adds. */
typedef struct {
    int64_t start, count, stride, pairs; /* columns, where the next row of them begins, and pairs of tokens */
    uint32_t *x;                         /* [pairs, stride], two tokens each */
    uint32_t *w;                         /* [ROWS / 2, stride], two rows each */
    float *to_x;                         /* [tokens, stride] */
    uint16_t *grad;                      /* [TOGETHER, stride] */
} Part;

/* Pairs of two rows of `count` numbers. */
INLINED void pair(const uint16_t *first, const uint16_t *second, int64_t count, uint32_t *out) {
    for (int64_t k = 0; k < count; k++) out[k] = first[k] | (second ? (uint32_t)second[k] << 16 : 0);
}

/* Sums over `rows` rows, from `row` on, of their gradients times the rounded weights; 32 columns, some tokens. */
INLINED PRODUCTS void pull(
    const Part *p, const uint32_t *grad, int64_t rows, int64_t k, int64_t token, const int tokens, int64_t stride) {
    __m512 sum[TOKENS][2];
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < 2; i++) sum[t][i] = _mm512_loadu_ps(p->to_x + (token + t) * p->stride + k + 16 * i);
    }
    for (int64_t j = 0; j < rows / 2; j++) {
        const __m512bh w[2] = {(__m512bh)of(p->w + j * p->stride + k), (__m512bh)of(p->w + j * p->stride + k + 16)};
        for (int t = 0; t < tokens; t++) {
            const __m512bh g = (__m512bh)_mm512_set1_epi32((int)grad[(token + t) * stride + j]);
            for (int i = 0; i < 2; i++) sum[t][i] = _mm512_dpbf16_ps(sum[t][i], g, w[i]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < 2; i++) _mm512_storeu_ps(p->to_x + (token + t) * p->stride + k + 16 * i, sum[t][i]);
    }
}

/* Gradients of TOGETHER rows, 64 columns or 32 at a time. */
INLINED PRODUCTS void gradients_at(
    const Part *p, const uint32_t *grad, int64_t stride, int64_t k, const int vectors) {
    __m512 sum[TOGETHER][4];
    for (int j = 0; j < TOGETHER; j++) {
        for (int i = 0; i < vectors; i++) sum[j][i] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < p->pairs; t++) {
        __m512bh x[4];
        for (int i = 0; i < vectors; i++) x[i] = (__m512bh)of(p->x + t * p->stride + k + 16 * i);
        for (int j = 0; j < TOGETHER; j++) {
            const __m512bh g = (__m512bh)_mm512_set1_epi32((int)grad[j * stride + t]);
            for (int i = 0; i < vectors; i++) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], g, x[i]);
        }
    }
    for (int j = 0; j < TOGETHER; j++) {
        for (int i = 0; i < vectors; i++) {
            const __m256bh narrow = _mm512_cvtneps_pbh(sum[j][i]);
            _mm256_storeu_si256((__m256i *)(p->grad + j * p->stride + k + 16 * i), (__m256i)narrow);
        }
    }
}

/* One row of the columns; `grad` is that of these, and `out` gets them as they were rounded before. */
static __attribute__((noinline)) void learn_row(
    const Matrix *m, const Slopes *s, const Part *p, int64_t row, const uint16_t *grad, uint16_t *out) {
    const int64_t groups = groups_of(m), first = p->start / m->width;
    Slopes here = *s;
    here.grad = grad - row * m->length - p->start;
    out -= row * m->length + p->start;
    for (int64_t place = first; place < groups && place * m->width < p->start + p->count; place++) {
        const Group g = group_of(m, row, place, groups);
        fetch_ahead(m, &g);
        if (s->to_outside && m->half) differentiate(&g, true, true, &here, true, true, true, true, out);
        else if (s->to_outside) differentiate(&g, false, true, &here, true, true, true, true, out);
        else if (m->half && has_steps_alone(m)) {
            const Group known = with_step_alone(g);
            differentiate(&known, true, true, &here, true, true, false, true, out);
        } else if (m->half) differentiate(&g, true, true, &here, true, true, false, true, out);
        else differentiate(&g, false, true, &here, true, true, false, true, out);
    }
}

/* What all weights of a symmetric matrix have in common. */
typedef struct {
    __m512 lo, hi, below, above, by;
} Common;

/* A register of weights of one row is learned from the gradient `x`: the operations of `differentiate`, in its order.
 * The result are the weights as they were rounded; what the step's gradient is the sum of is added to `by_step`. */
INLINED PRODUCTS __m512 learn_vector(
    const Common *c, __m512 x, const uint16_t *w, float *v, __m512 step, __m512 *by_step) {
    const __m512 offset = _mm512_loadu_ps(v), u = in_steps_all(w, step), to = _mm512_add_ps(u, offset);
    const __mmask16 reached = _mm512_cmp_ps_mask(to, c->below, _CMP_NLT_UQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(reached, to, c->above, _CMP_NGT_UQ);
    const __m512 slope = _mm512_mul_ps(x, step), n = snapped_all(to, c->lo, c->hi);
    const __mmask16 moves = _mm512_mask_cmp_ps_mask(inside, slope, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    const __m512i sign = _mm512_and_si512((__m512i)slope, _mm512_set1_epi32(INT32_MIN));
    const __m512 by = (__m512)_mm512_xor_si512(sign, (__m512i)c->by);
    _mm512_storeu_ps(v, _mm512_mask_sub_ps(offset, moves, offset, by));
    *by_step = _mm512_add_ps(*by_step, _mm512_mul_ps(x, _mm512_mask_sub_ps(n, inside, n, u)));
    return _mm512_mul_ps(n, step);
}

/* Sums of TOGETHER groups of the same length, in the order of `Sum`, of what its columns add up to. */
INLINED __m128 sums_of(const __m512 columns[TOGETHER][WIDE / VECTOR]) {
    float all[TOGETHER][WIDE];
    for (int j = 0; j < TOGETHER; j++) {
        for (int i = 0; i < WIDE / VECTOR; i++) _mm512_storeu_ps(all[j] + VECTOR * i, columns[j][i]);
        for (int column = 1; column < 4; column++) add(all[j], all[j] + column * LANES, LANES);
    }
    __m128 sum = _mm_setzero_ps();
    for (int lane = 0; lane < LANES; lane += TOGETHER) {
        __m128 four[TOGETHER]; /* lanes of a group, then a lane of each group */
        for (int j = 0; j < TOGETHER; j++) four[j] = _mm_loadu_ps(all[j] + lane);
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int j = 0; j < TOGETHER; j++) sum = _mm_add_ps(sum, four[j]);
    }
    return sum;
}

/* Whether `learn_groups` learns a matrix: most symmetric ones. Groups of more weights take several levels of `Sum`. */
static bool learns_groups(const Matrix *m, const Slopes *s) {
    return m->half && has_steps_alone(m) && !s->to_outside && !s->held && m->width % WIDE == 0 &&
           m->length % WIDE == 0 && m->width < PIECE;
}

/* A group of each of TOGETHER rows, of which gradients never leave the registers; `grad` is that of the product. */
static __attribute__((noinline)) PRODUCTS void learn_groups(
    const Matrix *m, const Slopes *s, const Part *p, int64_t row, int64_t place, const uint32_t *grad) {
    enum { vectors = WIDE / VECTOR };
    const int64_t groups = groups_of(m), length = m->length, pairs = p->pairs, stride = p->stride;
    const int64_t start = place * m->width, at = start - p->start;
    const int64_t count = length - start < m->width ? length - start : m->width;
    const Common common = {
        _mm512_set1_ps(m->lo), _mm512_set1_ps(m->hi), _mm512_set1_ps(m->lo - 0.5f), _mm512_set1_ps(m->hi + 0.5f),
        _mm512_set1_ps(s->move)};
    const uint16_t *const w = (const uint16_t *)m->w + row * length + start;
    float *const v = s->v + row * length + start;
    const uint32_t *const x = p->x + at;
    uint32_t *const rounded = p->w + row % ROWS / 2 * stride + at;
    /* The first of one register, the first of the other, the second of one, ... */
    const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i other = _mm512_add_epi32(counted, _mm512_set1_epi32(VECTOR));
    const __m512i in_turn = _mm512_or_si512(counted, _mm512_slli_epi32(other, 16));
    __m512 step[TOGETHER], by_step[TOGETHER][vectors];
    for (int j = 0; j < TOGETHER; j++) {
        step[j] = _mm512_set1_ps(m->step[(row + j) * groups + place]);
        for (int i = 0; i < vectors; i++) by_step[j][i] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < count; k += WIDE) {
        for (int i = 0; i < vectors; i += 2) {
            const int64_t first = k + VECTOR * i;
            __m512 sum[TOGETHER][2];
            for (int j = 0; j < TOGETHER; j++) sum[j][0] = sum[j][1] = _mm512_setzero_ps();
            for (int64_t t = 0; t < pairs; t++) {
                const uint32_t *const tokens = x + t * stride + first;
                const __m512bh low = (__m512bh)of(tokens), high = (__m512bh)of(tokens + VECTOR);
                for (int j = 0; j < TOGETHER; j++) {
                    const __m512bh g = (__m512bh)_mm512_set1_epi32((int)grad[j * pairs + t]);
                    sum[j][0] = _mm512_dpbf16_ps(sum[j][0], g, low);
                    sum[j][1] = _mm512_dpbf16_ps(sum[j][1], g, high);
                }
            }
            for (int j = 0; j < TOGETHER; j += 2) {
                for (int half = 0; half < 2; half++) {
                    __m512 two[2];
                    for (int l = 0; l < 2; l++) {
                        const int64_t here = (j + l) * length + first + VECTOR * half;
                        __builtin_prefetch(v + here + TOGETHER * length); /* the same columns of the next rows */
                        if (!half) __builtin_prefetch(w + here + TOGETHER * length);
                        const __m512 of_weights = widened_all((__m256i)_mm512_cvtneps_pbh(sum[j + l][half]));
                        two[l] = learn_vector(&common, of_weights, w + here, v + here, step[j + l], &by_step[j + l][i + half]);
                    }
                    const __m512i one_by_one = (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]);
                    uint32_t *const to = rounded + j / 2 * stride + first + VECTOR * half;
                    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(in_turn, one_by_one));
                }
            }
        }
    }
    if (!s->to_step) return;
    const __m128 sums = sums_of((const __m512(*)[vectors])by_step);
    for (int j = 0; j < TOGETHER; j++) s->to_step[(row + j) * groups + place] = sums[j];
}

/* One block of rows of some columns. */
INLINED PRODUCTS void learn_rows(
    const Matrix *m, const Slopes *s, const Products *q, const Part *p, int64_t row, const uint32_t *by_rows,
    const uint32_t *by_tokens) {
    const int64_t rows = m->rows - row < ROWS ? m->rows - row : ROWS;
    const bool by_groups = learns_groups(m, s);
    uint16_t two[2 * p->count];
    for (int64_t j = 0; j < rows; j += TOGETHER) {
        const uint32_t *grad = by_tokens + (row + j) * p->pairs;
        if (by_groups) {
            for (int64_t k = p->start; k < p->start + p->count; k += m->width)
                learn_groups(m, s, p, row + j, k / m->width, grad);
            continue;
        }
        int64_t k = 0;
        for (; k + 64 <= p->count; k += 64) gradients_at(p, grad, p->pairs, k, 4);
        for (; k < p->count; k += 32) gradients_at(p, grad, p->pairs, k, 2);
        for (int i = 0; i < TOGETHER; i++) {
            learn_row(m, s, p, row + j + i, p->grad + i * p->stride, two + i % 2 * p->count);
            if (i % 2) pair(two, two + p->count, p->count, p->w + (j + i) / 2 * p->stride);
        }
    }
    for (int64_t k = 0; q->to_x && k < p->count; k += 32) {
        const uint32_t *grad = by_rows + row / 2;
        const int64_t stride = m->rows / 2;
        for (int64_t t = 0; t < q->tokens; t += TOKENS) {
            switch (q->tokens - t) {
            case 1: pull(p, grad, rows, k, t, 1, stride); break;
            case 2: pull(p, grad, rows, k, t, 2, stride); break;
            case 3: pull(p, grad, rows, k, t, 3, stride); break;
            case 4: pull(p, grad, rows, k, t, 4, stride); break;
            case 5: pull(p, grad, rows, k, t, 5, stride); break;
            default: pull(p, grad, rows, k, t, TOKENS, stride);
            }
        }
    }
}

/* Offsets and ranges are learned, as by `auto_round_differentiate`, from the gradient of a product. */
PRODUCTS int auto_round_learn(const Matrix *m, const Slopes *s, const Products *q) {
    /* Threads have columns of their own, so that every sum is that of one thread. */
    const int64_t groups = groups_of(m), threads = m->threads < groups ? m->threads : groups;
    const int64_t columns = (groups + threads - 1) / threads * m->width;
    const int64_t pairs = (q->tokens + 1) / 2, blocks = (m->length + columns - 1) / columns;
    uint32_t *const by_rows = malloc((size_t)(q->tokens * m->rows / 2) * 4);
    uint32_t *const by_tokens = malloc((size_t)(pairs * m->rows) * 4);
    int failed = !by_rows || !by_tokens;
    if (!failed) {
        memcpy(by_rows, q->grad, (size_t)(q->tokens * m->rows) * 2);
        for (int64_t j = 0; j < m->rows; j++) {
            for (int64_t t = 0; t < pairs; t++) {
                const uint16_t *g = q->grad + 2 * t * m->rows + j;
                const uint32_t second = 2 * t + 1 < q->tokens ? g[m->rows] : 0;
                by_tokens[j * pairs + t] = g[0] | second << 16;
            }
        }
        EACH_ROW(m)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = block * columns;
            const int64_t count = m->length - start < columns ? m->length - start : columns;
            const int64_t stride = count + APART / 2;
            const size_t in_x = (size_t)(pairs * stride), in_w = (size_t)(ROWS / 2 * stride);
            const size_t to_x = (size_t)(q->tokens * stride), in_grad = (size_t)(TOGETHER * stride);
            char *const room = malloc(4 * (in_x + in_w + to_x) + 2 * in_grad);
            if (!room) {
                failed = 1;
                continue;
            }
            uint32_t *const first = (uint32_t *)room;
            const Part p = {start, count, stride, pairs, first, first + in_x, (float *)(first + in_x + in_w),
                            (uint16_t *)(first + in_x + in_w + to_x)};
            for (int64_t t = 0; t < pairs; t++) {
                const uint16_t *x = q->x + 2 * t * m->length + start;
                pair(x, 2 * t + 1 < q->tokens ? x + m->length : 0, count, p.x + t * stride);
            }
            memset(p.to_x, 0, 4 * to_x);
            for (int64_t row = 0; row < m->rows; row += ROWS) learn_rows(m, s, q, &p, row, by_rows, by_tokens);
            for (int64_t t = 0; q->to_x && t < q->tokens; t++) {
                uint16_t *out = q->to_x + t * m->length + start;
                for (int64_t k = 0; k < count; k++) out[k] = narrowed(p.to_x[t * stride + k]);
            }
            free(room);
        }
    }
    free(by_rows);
    free(by_tokens);
    return failed;
}
#else
int auto_round_multiplies(void) { return 0; }
#endif
