/* The step of symmetric whole numbers from the range of each group, and its gradients: what `SignedMax.fit` computes
 * with fourteen operations of PyTorch and as many backwards, each operation rounded as there, in one pass over the
 * groups.
 */

#include <stdint.h>

#define PIECE 4096 /* groups that a thread takes at a time */
#define IN const float *restrict
#define EACH_PIECE \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)") \
    for (int64_t at = 0; at < n; at += PIECE)
#define SIZE (n - at < PIECE ? n - at : PIECE)

typedef struct {
    const float *lo, *hi;           /* ranges, [n] */
    const float *knob_lo, *knob_hi; /* multipliers, [n]; null for 1 */
    float levels;                   /* of the side that has one more */
    float most, vanishing, normal;  /* of the dtype of stored steps: largest, what becomes 0, smallest normal number */
} Ranges;

static inline float extreme(float lo, float hi, float levels) { return (hi < lo ? lo : -hi) / levels; }

static inline float legal(float s, float most, float vanishing, float normal) {
    const float inside = s < -most ? -most : s > most ? most : s;
    return inside >= -vanishing && inside <= vanishing ? normal : inside;
}

static void fit(IN lo, IN hi, float levels, float most, float vanishing, float normal, float *restrict step, int64_t n) {
    for (int64_t i = 0; i < n; i++) step[i] = legal(extreme(-lo[i], hi[i], levels), most, vanishing, normal);
}

static void fit_with(
    IN lo, IN hi, IN knob_lo, IN knob_hi, float levels, float most, float vanishing, float normal,
    float *restrict step, int64_t n
) {
    for (int64_t i = 0; i < n; i++)
        step[i] = legal(extreme(-lo[i] * knob_lo[i], hi[i] * knob_hi[i], levels), most, vanishing, normal);
}

static void differentiate(
    IN lo, IN hi, IN knob_lo, IN knob_hi, float levels, float most, float vanishing, IN grad,
    float *restrict to_lo, float *restrict to_hi, int64_t n
) {
    for (int64_t i = 0; i < n; i++) {
        const float low = -lo[i] * knob_lo[i], high = hi[i] * knob_hi[i], s = extreme(low, high, levels), by = grad[i];
        const float kept = s >= -vanishing && s <= vanishing ? 0.0f : by;
        const float slope = kept * (s >= -most && s <= most ? 1.0f : 0.0f) / levels;
        to_lo[i] = (high < low ? slope : 0.0f) * -lo[i];
        to_hi[i] = -(high < low ? 0.0f : slope) * hi[i];
    }
}

/* Steps, before they are rounded to their dtype. */
void auto_round_signed_max(const Ranges *r, float *step, int64_t n, int threads) {
    EACH_PIECE {
        if (r->knob_lo)
            fit_with(r->lo + at, r->hi + at, r->knob_lo + at, r->knob_hi + at,
                     r->levels, r->most, r->vanishing, r->normal, step + at, SIZE);
        else fit(r->lo + at, r->hi + at, r->levels, r->most, r->vanishing, r->normal, step + at, SIZE);
    }
}

/* Gradients of both multipliers from that of the steps. */
void auto_round_signed_max_slopes(
    const Ranges *r, const float *grad, float *to_lo, float *to_hi, int64_t n, int threads
) {
    EACH_PIECE
        differentiate(r->lo + at, r->hi + at, r->knob_lo + at, r->knob_hi + at,
                      r->levels, r->most, r->vanishing, grad + at, to_lo + at, to_hi + at, SIZE);
}
