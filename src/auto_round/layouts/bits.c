/* Codes of 4 bits as dense words, and back: `pack_bits` and `unpack_bits` in one pass over each.
 *
 * Codes lie row by row. So do words, or, as GPTQ has them, those of all rows lie side by side; then tiles of a line
 * of the cache in both directions are turned, and no transposed copy is made.
 */

#include <stdint.h>
#include <string.h>

#define CODES 8  /* in a word */
#define WORDS 8  /* of a row at a time: their codes are a line of the cache */
#define ROWS 16  /* at a time: their words are a line of the cache */

/* Eight codes, one a byte, as one word. */
static inline uint32_t merge(const uint8_t *codes) {
    uint64_t x;
    memcpy(&x, codes, sizeof x);
    x = (x | x >> 4) & 0x00FF00FF00FF00FFull;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFull;
    return (uint32_t)(x | x >> 16);
}

static inline void part(uint32_t word, uint8_t *codes) {
    uint64_t x = word;
    x = (x | x << 16) & 0x0000FFFF0000FFFFull;
    x = (x | x << 8) & 0x00FF00FF00FF00FFull;
    x = (x | x << 4) & 0x0F0F0F0F0F0F0F0Full;
    memcpy(codes, &x, sizeof x);
}

#define EACH(COUNT, STEP) \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)") \
    for (int64_t first = 0; first < COUNT; first += STEP)

/* `codes` [rows, 8 * n], `words` [rows, n]. */
void auto_round_pack_rows(const uint8_t *codes, uint32_t *words, int64_t rows, int64_t n, int threads) {
    EACH(rows, 1)
        for (int64_t w = first * n; w < (first + 1) * n; w++) words[w] = merge(codes + CODES * w);
}

void auto_round_unpack_rows(const uint32_t *words, uint8_t *codes, int64_t rows, int64_t n, int threads) {
    EACH(rows, 1)
        for (int64_t w = first * n; w < (first + 1) * n; w++) part(words[w], codes + CODES * w);
}

/* One tile: `many` rows with `count` words each. */
static inline __attribute__((always_inline)) void pack_tile(
    const uint8_t *codes, uint32_t *words, int64_t rows, int64_t n, int many, int count
) {
    uint32_t tile[ROWS][WORDS];
    for (int r = 0; r < many; r++)
        for (int k = 0; k < count; k++) tile[r][k] = merge(codes + CODES * (r * n + k));
    for (int k = 0; k < count; k++)
        for (int r = 0; r < many; r++) words[k * rows + r] = tile[r][k];
}

static inline __attribute__((always_inline)) void unpack_tile(
    const uint32_t *words, uint8_t *codes, int64_t rows, int64_t n, int many, int count
) {
    uint32_t tile[ROWS][WORDS];
    for (int k = 0; k < count; k++)
        for (int r = 0; r < many; r++) tile[r][k] = words[k * rows + r];
    for (int r = 0; r < many; r++)
        for (int k = 0; k < count; k++) part(tile[r][k], codes + CODES * (r * n + k));
}

/* Sizes are constants in all but the last tiles, so that compilers unroll. */
#define EACH_TILE(DO, FROM, TO)                                                                       \
    EACH(rows, ROWS)                                                                                  \
        for (int64_t w = 0; w < n; w += WORDS) {                                                      \
            const int many = rows - first < ROWS ? rows - first : ROWS, count = n - w < WORDS ? n - w : WORDS; \
            if (many == ROWS && count == WORDS) DO(FROM, TO, rows, n, ROWS, WORDS);                   \
            else DO(FROM, TO, rows, n, many, count);                                                  \
        }

/* `codes` [rows, 8 * n], `words` [n, rows]. */
void auto_round_pack_columns(const uint8_t *codes, uint32_t *words, int64_t rows, int64_t n, int threads) {
    EACH_TILE(pack_tile, codes + CODES * (first * n + w), words + w * rows + first)
}

void auto_round_unpack_columns(const uint32_t *words, uint8_t *codes, int64_t rows, int64_t n, int threads) {
    EACH_TILE(unpack_tile, words + w * rows + first, codes + CODES * (first * n + w))
}
