/* Products with packed FP4 and FP8 weights on a CPU.
 *
 * Weights are E2M1 numbers, two in a byte, or E4M3 numbers of a byte; as many neighbours of a row as a group has
 * share a step, and so may several rows. A step is a float, or a byte that a table of 256 floats stands for (a
 * power of two, or an FP8 number over that of the tensor). Weights of a group are multiplied as they are and
 * summed in float32; only the sums are multiplied by the step.
 *
 * A row is a sequence of blocks of 64 weights, eight vectors of eight. Those of FP4 are so placed in the 32 bytes
 * of a block that unpacking leaves them in order: number 8 v + 4 lane + k lies in byte 16 lane + 4 (v % 4) + k,
 * in the low nibble if v < 4.
 */

#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define BLOCK 64
#define VECTORS 8  /* of a block */
#define TOKENS 4   /* whose sums fit into registers beside a block's numbers */
#define AHEAD 2048 /* bytes fetched ahead */

typedef float v8 __attribute__((vector_size(32)));
typedef float v8u __attribute__((vector_size(32), aligned(4), may_alias));

struct call {
    const float *x;       /* [tokens][n_in] */
    const uint8_t *codes; /* [n_out][n_in * bits / 8] */
    const void *steps;    /* [ceil(n_out / rows)][ceil(n_in / width)], float or bytes */
    const float *table;   /* float of each byte; null where steps are floats */
    float *y;             /* [tokens][n_out]; of `numbers` [n_out][n_in] */
    int64_t tokens, n_in, n_out;
    int64_t width, rows;  /* weights of a row, and rows, that share a step */
    int bits, threads;
};

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX2__

/* 64 E2M1 numbers. Such a number in bfloat16 has its sign and seven bits of exponent in the upper byte. */
INLINE void fp4(const uint8_t *codes, v8 w[VECTORS]) {
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, (char)0x80, (char)0xbf, (char)0xbf, (char)0xbf, (char)0xc0,
        (char)0xc0, (char)0xc0, (char)0xc0));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0, (char)0x80, (char)0xc0, 0, 0x40, (char)0x80, (char)0xc0, 0, 0, (char)0x80, (char)0xc0, 0, 0x40,
        (char)0x80, (char)0xc0));
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m256i octets = _mm256_loadu_si256((const __m256i *)codes);
    for (int half = 0; half < 2; half++) {
        const __m256i code = _mm256_and_si256(half ? _mm256_srli_epi16(octets, 4) : octets, nibble);
        const __m256i up = _mm256_shuffle_epi8(upper, code), low = _mm256_shuffle_epi8(lower, code);
        const __m256i pair[2] = {_mm256_unpacklo_epi8(low, up), _mm256_unpackhi_epi8(low, up)};
        for (int i = 0; i < 2; i++) {
            w[4 * half + 2 * i] = (v8)_mm256_unpacklo_epi16(zero, pair[i]);
            w[4 * half + 2 * i + 1] = (v8)_mm256_unpackhi_epi16(zero, pair[i]);
        }
    }
}

/* 64 E4M3 numbers. Moved to where a float16 has sign, exponent and mantissa they are 2^8 times too small. */
INLINE void fp8(const uint8_t *codes, v8 w[VECTORS]) {
    const __m256i kept = _mm256_set1_epi16((short)0xbf80);
    for (int i = 0; i < VECTORS / 2; i++) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
        const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), kept);
        w[2 * i] = (v8)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
        w[2 * i + 1] = (v8)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
}

#define FP8_SCALE 256.0f

#else

typedef int32_t v4i __attribute__((vector_size(16)));
typedef float v4 __attribute__((vector_size(16)));
typedef uint8_t v4b __attribute__((vector_size(4)));

INLINE v4i four(const uint8_t *octets) {
    v4b found;
    memcpy(&found, octets, 4);
    return __builtin_convertvector(found, v4i);
}

/* Numbers of four codes: what is below the smallest normal number is a multiple of the least one. */
INLINE void decode(v4i code, const int bits, const int mantissa, const int bias, const float least, void *w) {
    const v4i size = code & ((1 << (bits - 1)) - 1), small = size < 1 << mantissa;
    const v4i normal = (size << (23 - mantissa)) + ((127 - bias) << 23);
    const v4i multiple = (v4i)(__builtin_convertvector(size, v4) * least);
    *(v4i *)w = (small & multiple) | (~small & normal) | (code >> (bits - 1)) << 31;
}

INLINE void fp4(const uint8_t *codes, v8 w[VECTORS]) {
    for (int i = 0; i < VECTORS; i++) {
        const v4i octets = four(codes + 16 * (i % 2) + 4 * (i / 2));
        decode(octets & 15, 4, 1, 1, 0.5f, (v4 *)&w[i / 2] + i % 2);
        decode(octets >> 4, 4, 1, 1, 0.5f, (v4 *)&w[i / 2 + 4] + i % 2);
    }
}

INLINE void fp8(const uint8_t *codes, v8 w[VECTORS]) {
    for (int i = 0; i < 2 * VECTORS; i++)
        decode(four(codes + 4 * i), 8, 3, 7, 1 / 512.0f, (v4 *)&w[i / 2] + i % 2);
}

#define FP8_SCALE 1.0f

#endif

INLINE void numbers_of(const uint8_t *codes, const int bits, v8 w[VECTORS]) {
    if (bits == 4) fp4(codes, w);
    else fp8(codes, w);
}

/* The step at a place among those of a row. */
INLINE float step_at(const struct call *c, const void *steps, int64_t at) {
    return c->table ? c->table[((const uint8_t *)steps)[at]] : ((const float *)steps)[at];
}

INLINE const void *steps_of(const struct call *c, int64_t row) {
    const int64_t first = row / c->rows * ((c->n_in + c->width - 1) / c->width);
    return (const char *)c->steps + first * (c->table ? sizeof(uint8_t) : sizeof(float));
}

/* One output for `tokens` tokens; `unit` weights of a block share a step for sure. */
INLINE void output(const struct call *c, int64_t row, int64_t token, const int tokens, const int bits,
                   const int unit) {
    const int slots = tokens == 1 ? 4 : 2; /* sums that do not wait for one another */
    const uint8_t *codes = c->codes + row * (c->n_in * bits / 8);
    const void *steps = steps_of(c, row);
    const int64_t repeats = unit == BLOCK ? c->width / BLOCK : 1;
    const float *x = c->x + token * c->n_in;
    v8 total[TOKENS][4] = {{{0}}};
    int64_t place = 0, left = repeats;
    for (int64_t k = 0; k < c->n_in; k += BLOCK) {
        v8 w[VECTORS];
        __builtin_prefetch(codes + AHEAD);
        numbers_of(codes, bits, w);
        codes += BLOCK * bits / 8;
        for (int u = 0; u < BLOCK / unit; u++) {
            const float step = step_at(c, steps, place);
            if (--left == 0) place++, left = repeats;
            for (int t = 0; t < tokens; t++) {
                const float *from = x + t * c->n_in + k + u * unit;
                v8 sum = w[u * unit / 8] * *(const v8u *)from;
                for (int i = 1; i < unit / 8; i++) sum += w[u * unit / 8 + i] * *(const v8u *)(from + 8 * i);
                if (bits == 8) sum *= FP8_SCALE;
                total[t][u % slots] += sum * step;
            }
        }
    }
    for (int t = 0; t < tokens; t++) {
        v8 sum = total[t][0];
        for (int i = 1; i < slots; i++) sum += total[t][i];
        const float four[4] = {sum[0] + sum[4], sum[1] + sum[5], sum[2] + sum[6], sum[3] + sum[7]};
        c->y[(token + t) * c->n_out + row] = (four[0] + four[2]) + (four[1] + four[3]);
    }
}

INLINE void outputs(const struct call *c, const int bits, const int unit) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1)
    for (int64_t row = 0; row < c->n_out; row++) {
        int64_t token = 0;
        for (; token + TOKENS <= c->tokens; token += TOKENS) output(c, row, token, TOKENS, bits, unit);
        switch (c->tokens - token) {
            case 1: output(c, row, token, 1, bits, unit); break;
            case 2: output(c, row, token, 2, bits, unit); break;
            case 3: output(c, row, token, 3, bits, unit); break;
        }
    }
}

/* y = x W^T. Groups have 16, 32 or a multiple of 64 weights of a row. */
void auto_round_float_linear(const struct call *c) {
    if (c->bits == 4) {
        if (c->width == 16) outputs(c, 4, 16);
        else if (c->width == 32) outputs(c, 4, 32);
        else outputs(c, 4, BLOCK);
    } else {
        if (c->width == 16) outputs(c, 8, 16);
        else if (c->width == 32) outputs(c, 8, 32);
        else outputs(c, 8, BLOCK);
    }
}

INLINE void dequantize(const struct call *c, const int bits) {
#pragma omp parallel for schedule(static) num_threads(c->threads) if (c->threads > 1)
    for (int64_t row = 0; row < c->n_out; row++) {
        const uint8_t *codes = c->codes + row * (c->n_in * bits / 8);
        const void *steps = steps_of(c, row);
        float *to = c->y + row * c->n_in;
        for (int64_t k = 0; k < c->n_in; k += BLOCK) {
            v8 w[VECTORS];
            numbers_of(codes + k * bits / 8, bits, w);
            if (bits == 8)
                for (int v = 0; v < VECTORS; v++) w[v] *= FP8_SCALE;
            for (int v = 0; v < VECTORS; v++)
                *(v8u *)(to + k + 8 * v) = w[v] * step_at(c, steps, (k + 8 * v) / c->width);
        }
    }
}

/* The weights, each rounded once. */
void auto_round_float_numbers(const struct call *c) {
    if (c->bits == 4) dequantize(c, 4);
    else dequantize(c, 8);
}
