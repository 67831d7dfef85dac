/*
 * Products of 16 x 16 numbers.
 *
 * A tile is 16 rows of a matrix, as they lie in memory, times a panel: 16 columns whose words lie side by side. Word w
 * of column c is `line` bytes * w + 4 bytes * c from the panel's start. A word is one number in float32, and two
 * successive ones in bfloat16; this is the order in which AMX and AVX512_BF16 take their right factor.
 */

#include "lanes.h"

/* out[p] (16, 16) = 16 rows, `bytes` of each, times panels[p], `count` of one or two. */
INLINE void tile(int bfloat16, const char *left, int64_t stride, const char *panels[2], int64_t line, int count,
                 int64_t bytes, float out[2][AREA]) {
    int rows = TOGETHER / count;
    for (int top = 0; top < SIDE; top += rows) {
        const char *words = left + top * stride, *first = panels[0], *second = panels[count - 1];
        Lanes sums[TOGETHER] = {{0}};
        for (int64_t at = 0; at < bytes; at += 4, first += line, second += line) {
            Lanes right[2] = {load(first), load(second)};
            for (int row = 0; row < rows; row++) {
                const char *word = words + row * stride + at;
                for (int panel = 0; panel < count; panel++) {
                    Lanes *add = sums + row * count + panel;
#if defined(BFLOAT16)
                    if (bfloat16) {
                        *add = add_pairs(*add, _mm512_set1_epi32(*(const Pair *)word), (__m512i)right[panel]);
                        continue;
                    }
#endif
                    *add += *(const float *)word * right[panel];
                }
            }
        }
        for (int row = 0; row < rows; row++)
            for (int panel = 0; panel < count; panel++)
                store(out[panel] + (top + row) * SIDE, sums[row * count + panel]);
    }
    (void)bfloat16;
}

/* `bytes`, filled up to a multiple of 64. */
INLINE int64_t whole(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

INLINE int64_t least(int64_t one, int64_t other) {
    return one < other ? one : other;
}

/*
 * Two blocks of 16 rows times one or two panels, and what is left to do with the results, in units. AMX multiplies
 * beside the other units of a core, but does so only if their instructions lie between its own. So results are put away
 * while the next ones are made.
 */
typedef struct Rest Rest;
struct Rest {
    float out[2][2][AREA]; /* of each block and panel */
    int bfloat16, panels, unit, units;
    void (*put_away)(const Rest *rest, int unit);
    char *to;           /* where the first number goes */
    int64_t step, next; /* bytes from one row to the next, and to what belongs to the second panel */
    int64_t rows;       /* that are there */
    int64_t activation;
    int float32;        /* whether results are kept so */
};

/* For the results of the next panels, of which so many are left. */
INLINE Rest *next_rest(Rest *rest, int bfloat16, int64_t left) {
    rest->bfloat16 = bfloat16;
    rest->panels = least(left, 2);
    return rest;
}

INLINE void put_some_away(Rest *rest) {
    if (rest->unit < rest->units)
        rest->put_away(rest, rest->unit++);
}

static void put_away(Rest *rest) {
    while (rest->unit < rest->units)
        put_some_away(rest);
}

/* A matrix: where it begins, and bytes from row to row. */
typedef struct {
    const char *at;
    int64_t stride;
} Matrix;

#if defined(AMX)
/* Add the products of 64 bytes of each row. */
INLINE void add_amx(const char *blocks[2], int64_t stride, const char *first, const char *second, int64_t line) {
    _tile_loadd(4, blocks[0], stride);
    _tile_loadd(6, first, line);
    _tile_loadd(5, blocks[1], stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (second) {
        _tile_loadd(7, second, line);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
}

static void tiles_amx(const char *left[2], int64_t stride, const char *panels[2], int64_t line, int64_t bytes,
                      int64_t ahead, Rest *rest, Rest *before) {
    const char *first = panels[0], *second = rest->panels == 2 ? panels[1] : NULL;
    int64_t at = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; at + 64 <= bytes; at += 64, first += SIDE * line, second = second ? second + SIDE * line : NULL) {
        const char *blocks[2] = {left[0] + at, left[1] + at};
        if (ahead)
            for (int row = 0; row < SIDE; row++) {
                __builtin_prefetch(blocks[0] + row * stride + ahead, 0, 2);
                __builtin_prefetch(blocks[1] + row * stride + ahead, 0, 2);
            }
        add_amx(blocks, stride, first, second, line);
        put_some_away(before);
    }
    if (at < bytes) { /* zeros, whatever the panel has there */
        char ends[2][SIDE][64] __attribute__((aligned(64)));
        const char *blocks[2] = {ends[0][0], ends[1][0]};
        for (int block = 0; block < 2; block++)
            for (int row = 0; row < SIDE; row++)
                store(ends[block][row], load_some(left[block] + row * stride + at, bytes - at));
        add_amx(blocks, 64, first, second, line);
    }
    _tile_stored(0, rest->out[0][0], 64);
    _tile_stored(1, rest->out[1][0], 64);
    if (second) {
        _tile_stored(2, rest->out[0][1], 64);
        _tile_stored(3, rest->out[1][1], 64);
    }
}

/* Make the tiles ready, and keep how oneDNN may have left them; AMX has 8 of 16 rows of 64 bytes. */
static void begin_tiles(char before[64]) {
    char all[64] __attribute__((aligned(64))) = {1};
    _tile_storeconfig(before);
    for (int number = 0; number < 8; number++) {
        all[16 + 2 * number] = 64;
        all[48 + number] = SIDE;
    }
    _tile_loadconfig(all);
}

static void end_tiles(const char before[64]) {
    if (before[0])
        _tile_loadconfig(before);
    else
        _tile_release();
}
#endif

/*
 * Fill rest->out with `bytes` of the rows of two blocks times rest->panels panels, while `before` is put away. What lies
 * `ahead` of the rows is fetched, unless that is 0. Where `bytes` are no multiple of 64, panels must have numbers there.
 */
static void tiles(const char *left[2], int64_t stride, const char *panels[2], int64_t line, int64_t bytes, int64_t ahead,
                  Rest *rest, Rest *before) {
#if defined(AMX)
    if (rest->bfloat16) {
        tiles_amx(left, stride, panels, line, bytes, ahead, rest, before);
        put_away(before);
        return;
    }
#endif
    (void)ahead;
    put_away(before);
    for (int block = 0; block < 2; block++)
        if (rest->bfloat16 && rest->panels == 2)
            tile(1, left[block], stride, panels, line, 2, bytes, rest->out[block]);
        else if (rest->bfloat16)
            tile(1, left[block], stride, panels, line, 1, bytes, rest->out[block]);
        else if (rest->panels == 2)
            tile(0, left[block], stride, panels, line, 2, bytes, rest->out[block]);
        else
            tile(0, left[block], stride, panels, line, 1, bytes, rest->out[block]);
}
