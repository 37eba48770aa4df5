/* Packed int4 matrices times bfloat16 activations, for x86 with AVX-512 BF16 and VBMI.
 *
 * A packed matrix is a row of blocks of 64 outputs; a block is `n_in` lines of 32 bytes, one an input. Byte b
 * of a line holds output b in its low nibble and output b + 32 in its high one. Code c of a group stands for
 * `(c - 8) * step + fold`; `scale_zero` holds that pair for `[group][output]` in bfloat16. With two planes a
 * line of the second follows those of the first, and both multiply the same inputs.
 *
 * Codes become bfloat16 numbers -8 ... 7, which is exact, are multiplied in pairs of inputs and summed in
 * float32 within a group; only the sums are multiplied by the step.
 */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 64  /* outputs of a block */
#define LINE 32   /* bytes of an input in a block */
#define ROWS 4    /* tokens whose sums fit into registers */
#define AHEAD 7168 /* bytes fetched ahead into the second-level cache: 24 GB/s; 4096 gives 21, the first level 15 */

/* Bytes of two lines as 16-bit lanes: lane 2 i + p holds outputs i, i + 32, i + 16, i + 48 of line p. */
static inline __m512i pairing(void) {
    uint8_t from[64];
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < 2; p++)
            for (int half = 0; half < 2; half++) from[(2 * i + p) * 2 + half] = p * LINE + half * 16 + i;
    return _mm512_loadu_si512(from);
}

/* Code -> bfloat16, twice, so that the bit above a code does not matter. */
static inline __m512i numbers(void) {
    uint16_t table[32];
    for (int c = 0; c < 32; c++) {
        union { float f; uint32_t u; } value = {(float)(c % 16 - 8)};
        table[c] = value.u >> 16;
    }
    return _mm512_loadu_si512(table);
}

static inline __m512 low_halves(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

static inline __m512 high_halves(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

/* Sum of one group of activations. */
static float sum_of(const uint16_t *x, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 32) {
        __m512i pairs = _mm512_loadu_si512(x + k);
        sum = _mm512_add_ps(sum, _mm512_add_ps(low_halves(pairs), high_halves(pairs)));
    }
    return _mm512_reduce_add_ps(sum);
}

struct call {
    const uint16_t *x;          /* [tokens][n_in] */
    const uint8_t *packed;      /* [outputs, padded / 64][planes * n_in][32] */
    const uint32_t *scale_zero; /* [planes * n_in / width][padded] */
    const float *sums;          /* [tokens][n_in / width] */
    uint16_t *y;                /* [tokens][n_out] */
    int64_t tokens, n_in, n_out, width, planes;
};

/* One block of outputs for `rows` tokens from `token` on. */
static inline __attribute__((always_inline)) void block_rows(
    const struct call *c, int64_t block, int64_t token, const int rows, __m512i pairing_, __m512i numbers_) {
    const int64_t groups = c->n_in / c->width, padded = (c->n_out + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t ahead = c->width * LINE < AHEAD ? AHEAD / (c->width * LINE) : 1;
    const uint8_t *line = c->packed + block * c->planes * c->n_in * LINE;
    __m512 total[ROWS][4], sum[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) total[r][i] = _mm512_setzero_ps();
    for (int64_t q = 0; q < c->planes * groups; q++) {
        const int64_t at = q % groups;
        const uint16_t *x = c->x + token * c->n_in + at * c->width;
        const uint32_t *scale = c->scale_zero + q * padded + block * BLOCK;
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++) sum[r][i] = _mm512_setzero_ps();
        for (int i = 0; i < 4; i++) _mm_prefetch((const char *)(scale + ahead * padded + 16 * i), _MM_HINT_T0);
        for (int64_t k = 0; k < c->width; k += 2, line += 2 * LINE) {
            _mm_prefetch((const char *)line + AHEAD, _MM_HINT_T1);
            __m512i codes = _mm512_permutexvar_epi8(pairing_, _mm512_loadu_si512(line));
            __m512bh w[4];
            w[0] = (__m512bh)_mm512_permutexvar_epi16(codes, numbers_);
            w[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), numbers_);
            w[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), numbers_);
            w[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), numbers_);
            for (int r = 0; r < rows; r++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + r * c->n_in + k));
                for (int i = 0; i < 4; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], w[i], pair);
            }
        }
        for (int i = 0; i < 4; i++) {
            __m512i pairs = _mm512_loadu_si512(scale + 16 * i);
            for (int r = 0; r < rows; r++) {
                __m512 inputs = _mm512_set1_ps(c->sums[(token + r) * groups + at]);
                total[r][i] = _mm512_fmadd_ps(inputs, high_halves(pairs), total[r][i]);
                total[r][i] = _mm512_fmadd_ps(sum[r][i], low_halves(pairs), total[r][i]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            const int64_t first = block * BLOCK + 16 * i, left = c->n_out - first;
            const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
            _mm256_mask_storeu_epi16(
                c->y + (token + r) * c->n_out + first, there, (__m256i)_mm512_cvtneps_pbh(total[r][i]));
        }
}

/* Whether this processor has the instructions. */
int auto_round_usable(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

/* y = x W^T for a few tokens. Returns 0, or 1 when there is no memory. */
int auto_round_linear(const uint16_t *x, const uint8_t *packed, const uint32_t *scale_zero, uint16_t *y,
                      int64_t tokens, int64_t n_in, int64_t n_out, int64_t width, int64_t planes, int threads) {
    const int64_t groups = n_in / width;
    float *sums = malloc(sizeof(float) * tokens * groups + 1);
    if (!sums) return 1;
    for (int64_t i = 0; i < tokens * groups; i++) sums[i] = sum_of(x + i * width, width);
    const struct call c = {x, packed, scale_zero, sums, y, tokens, n_in, n_out, width, planes};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < (n_out + BLOCK - 1) / BLOCK; block++) {
        const __m512i p = pairing(), n = numbers();
        int64_t token = 0;
        for (; token + ROWS <= tokens; token += ROWS) block_rows(&c, block, token, ROWS, p, n);
        switch (tokens - token) {
            case 1: block_rows(&c, block, token, 1, p, n); break;
            case 2: block_rows(&c, block, token, 2, p, n); break;
            case 3: block_rows(&c, block, token, 3, p, n); break;
        }
    }
    free(sums);
    return 0;
}

/* Numbers of a strip of weights, which the matrix unit multiplies: 64 outputs times `STRIP` inputs. */
#define STRIP 512  /* inputs unpacked at a time: of 32 tokens they fill a first-level cache */
#define WIDE 4     /* blocks of outputs that share a reading of the activations */
#define TILE 16    /* rows of a matrix unit's tile, each of 64 bytes */
#define TOKENS 512 /* tokens whose sums, with weights and activations, fit into a second-level cache */

/* Steps and folds of 64 outputs in the order of `unpack_strip`: [nibble][half], each output twice. */
static inline void spread(const uint32_t *scale, __m512 step[4][2], __m512 fold[4][2]) {
    static const int outputs[4] = {0, 32, 16, 48};
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            __m256i eight = _mm256_loadu_si256((const __m256i *)(scale + outputs[i] + 8 * half));
            __m512i twice = _mm512_permutexvar_epi32(
                _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), _mm512_castsi256_si512(eight));
            step[i][half] = low_halves(twice);
            fold[i][half] = high_halves(twice);
        }
}

/* Weights of one block, inputs `start` ... `start + count` - 1, rounded to bfloat16: tiles of 16 pairs of inputs
 * and 16 outputs, `[output / 16][input / 32][16 pairs][16 outputs][2]`. */
static inline __attribute__((always_inline)) void unpack_strip(
    const struct call *c, int64_t block, int64_t start, int64_t count, uint16_t *tiles, const int planes) {
    const __m512i pairing_ = pairing();
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const int64_t groups = c->n_in / c->width, padded = (c->n_out + BLOCK - 1) / BLOCK * BLOCK;
    static const int column[4] = {0, 2, 1, 3};
    for (int64_t k = start; k < start + count; k += 32) {
        uint16_t *tile = tiles + (k - start) * TILE;
        const uint8_t *line = c->packed + (block * planes * c->n_in + k) * LINE;
        __m512 step[2][4][2], fold[2][4][2];
        for (int p = 0; p < planes; p++)
            spread(c->scale_zero + (p * groups + k / c->width) * padded + block * BLOCK, step[p], fold[p]);
        for (int pair = 0; pair < TILE; pair++, line += 2 * LINE) {
            __m512i half[2][2];
            for (int p = 0; p < planes; p++) {
                const uint8_t *from = line + p * c->n_in * LINE;
                _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T1);
                __m512i codes = _mm512_permutexvar_epi8(pairing_, _mm512_loadu_si512(from));
                half[p][0] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
                half[p][1] = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
            }
            for (int i = 0; i < 4; i++) {
                __m512 w[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (int h = 0; h < 2; h++)
                    for (int p = 0; p < planes; p++) {
                        __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(half[p][h], 4 * i), table);
                        __m512 part = _mm512_fmadd_ps(code, step[p][i][h], fold[p][i][h]);
                        w[h] = p ? _mm512_add_ps(w[h], part) : part;
                    }
                _mm512_storeu_si512(tile + column[i] * count * TILE + pair * 32,
                                    (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
            }
        }
    }
}

static void configure(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = TILE;
    _tile_loadconfig(&tiles);
}

/* sums[32 tokens][64 n outputs] (+)= x W^T over one strip. */
static void multiply(const uint16_t *x, int64_t n_in, const uint16_t *tiles, int64_t count, float *sums,
                     int64_t outputs, int begin) {
    for (int64_t n = 0; n < outputs; n += 2 * TILE) {
        const uint16_t *b = tiles + n * count;
        float *to = sums + n;
        const int64_t pitch = outputs * sizeof(float);
        if (begin) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        } else {
            _tile_loadd(0, to, pitch);
            _tile_loadd(1, to + TILE, pitch);
            _tile_loadd(2, to + TILE * outputs, pitch);
            _tile_loadd(3, to + TILE * outputs + TILE, pitch);
        }
        for (int64_t k = 0; k < count; k += 32) {
            _tile_loadd(4, x + k, n_in * sizeof(*x));
            _tile_loadd(5, x + TILE * n_in + k, n_in * sizeof(*x));
            _tile_loadd(6, b + k * TILE, 64);
            _tile_loadd(7, b + (count + k) * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, pitch);
        _tile_stored(1, to + TILE, pitch);
        _tile_stored(2, to + TILE * outputs, pitch);
        _tile_stored(3, to + TILE * outputs + TILE, pitch);
    }
}

/* A few blocks of outputs for up to TOKENS tokens. */
static void wide(const struct call *c, int64_t first, int64_t blocks, int64_t token, int64_t tokens,
                 uint16_t *tiles, float *sums) {
    const int64_t outputs = blocks * BLOCK;
    for (int64_t start = 0; start < c->n_in; start += STRIP) {
        const int64_t count = c->n_in - start < STRIP ? c->n_in - start : STRIP;
        for (int64_t b = 0; b < blocks; b++) {
            uint16_t *to = tiles + b * BLOCK * count;
            if (c->planes == 1) unpack_strip(c, first + b, start, count, to, 1);
            else unpack_strip(c, first + b, start, count, to, 2);
        }
        for (int64_t t = 0; t < tokens; t += 2 * TILE)
            multiply(c->x + (token + t) * c->n_in + start, c->n_in, tiles, count, sums + t * outputs, outputs,
                     start == 0);
    }
    for (int64_t t = 0; t < tokens && token + t < c->tokens; t++)
        for (int64_t n = 0; n < outputs; n += 16) {
            const int64_t at = first * BLOCK + n, left = c->n_out - at;
            const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
            _mm256_mask_storeu_epi16(c->y + (token + t) * c->n_out + at, there,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + t * outputs + n)));
        }
}

/* y = x W^T for many tokens by the matrix unit. `x` is followed by memory up to a multiple of 32 tokens; whoever
 * calls has asked the system for the unit. Returns 0, or 1 when there is no memory. */
int auto_round_linear_amx(const uint16_t *x, const uint8_t *packed, const uint32_t *scale_zero, uint16_t *y,
                          int64_t tokens, int64_t n_in, int64_t n_out, int64_t width, int64_t planes, int threads) {
    const struct call c = {x, packed, scale_zero, 0, y, tokens, n_in, n_out, width, planes};
    const int64_t blocks = (n_out + BLOCK - 1) / BLOCK, share = (blocks + threads - 1) / threads;
    const int64_t step = share < WIDE ? share : WIDE, rows = (tokens + 2 * TILE - 1) / (2 * TILE) * (2 * TILE);
    const int64_t most = rows < TOKENS ? rows : TOKENS;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        uint16_t *tiles = aligned_alloc(64, sizeof(*tiles) * WIDE * BLOCK * STRIP);
        float *sums = aligned_alloc(64, sizeof(*sums) * most * WIDE * BLOCK);
        failed = !tiles || !sums;
        if (!failed) configure();
        for (int64_t token = 0; token < rows; token += TOKENS) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t first = 0; first < blocks; first += step) {
                if (failed) continue;
                wide(&c, first, blocks - first < step ? blocks - first : step, token,
                     rows - token < TOKENS ? rows - token : TOKENS, tiles, sums);
            }
        }
        if (!failed) _tile_release();
        free(tiles);
        free(sums);
    }
    return failed;
}
