/*
 * The experts of an MoE layer, forward. native.py compiles this file and calls mhmoe_experts.
 *
 * Products are made in tiles of 16 x 16 results: 16 rows of a weight, as they lie in memory, times a panel. A panel has
 * the numbers of 16 tokens side by side: word w of token c is panel[w * 16 + c]. A word is one number in float32, and
 * two in bfloat16; this is the order in which AMX and AVX512_BF16 take their right factor. So the few tokens are brought
 * into another order, and the many weights are read once, where they are. Libraries do it the other way round.
 *
 * With up to FEW tokens, reading the weights takes longest; then products are made row by row, without panels.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define BFLOAT16
#endif
#if defined(BFLOAT16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    SIDE = 16,           /* of a tile */
    AREA = SIDE * SIDE,
    FEW = 4,             /* tokens of an expert */
    MOST = 256,          /* tokens of an expert that a task takes */
    SPACE = 1 << 20,     /* bytes of panels: what stays in a core's cache, beside weights */
    SUMMED = 16,         /* tokens whose outputs a task adds up */
};

typedef struct {
    int64_t bfloat16; /* else float32 */
    int64_t tokens, top_k, experts, width, inner, parts, threads;
    int64_t first_expert, first_row, down_expert, down_row; /* strides of the weights, in bytes */
    const char *hidden;   /* (tokens, width) */
    const char *first;    /* (experts, 2 inner, width): gates, then ups */
    const char *down;     /* (experts, width, inner) */
    const float *scales;  /* (tokens, top_k) */
    const int64_t *index; /* (tokens, top_k); other processes have the experts that are not in 0, ..., experts - 1 */
    int64_t *slots;       /* (tokens * top_k,), work space: which of the index each row belongs to */
    int64_t *places;      /* (tokens * top_k,), work space: the row of each of the index */
    int64_t *starts;      /* (experts + 1,), work space: the first row of each expert */
    float *rows;          /* (parts, tokens * top_k, width), work space: outputs of the experts, or of parts of them */
    char *output;         /* (tokens, width) */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
} Problem;

typedef struct {
    int64_t expert, start, stop, part; /* rows from start to stop; which part of the inner numbers */
} Task;

typedef struct {
    const Problem *problem;
    const Task *tasks;
    int64_t count, next, failed;
} Work;

/* ---- sixteen numbers ---- */

typedef float Lanes __attribute__((vector_size(4 * SIDE), aligned(4)));

INLINE Lanes load(const void *from) {
    return *(const Lanes *)from;
}

/* The first `bytes` of them, a multiple of 4, and zeros; all if there are more. */
INLINE Lanes load_some(const void *from, int64_t bytes) {
    if (bytes >= 4 * SIDE)
        return load(from);
#if defined(__AVX512F__)
    return (Lanes)_mm512_maskz_loadu_epi32((__mmask16)((1u << bytes / 4) - 1), from);
#else
    Lanes lanes = {0};
    memcpy(&lanes, from, bytes);
    return lanes;
#endif
}

INLINE void store(void *to, Lanes lanes) {
    *(Lanes *)to = lanes;
}

#if defined(__AVX512F__)
enum { TOGETHER = 16 }; /* sums that the registers hold */

INLINE float sum(Lanes lanes) {
    return _mm512_reduce_add_ps((__m512)lanes);
}

/* x / (1 + e^power), with e^power = 2^count * e^rest */
INLINE Lanes silu(Lanes x) {
    __m512 one = _mm512_set1_ps(1), most = _mm512_set1_ps(87); /* beyond, float32 has no place for it */
    __m512 power = _mm512_sub_ps(_mm512_setzero_ps(), (__m512)x);
    power = _mm512_max_ps(-most, _mm512_min_ps(most, power)); /* in this order a NaN stays */
    __m512 count = _mm512_roundscale_ps(_mm512_mul_ps(power, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(count, _mm512_set1_ps(0.693359375f), power); /* ln 2 in two numbers */
    rest = _mm512_fmadd_ps(count, _mm512_set1_ps(2.12194440e-4f), rest);
    __m512 series = _mm512_set1_ps(1.0f / 720);
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 120));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 24));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 6));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.5f));
    series = _mm512_fmadd_ps(series, rest, one);
    series = _mm512_fmadd_ps(series, rest, one);
    __m512 below = _mm512_add_ps(_mm512_scalef_ps(series, count), one);
    __m512 inverse = _mm512_rcp14_ps(below); /* and a step of Newton's: half the time of a division */
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2)));
    return x * (Lanes)inverse;
}

/* Exchange the blocks of step x step words beside the diagonal, in all blocks of twice that size. */
INLINE void exchange(__m512i lines[SIDE], int step) {
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 right = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(step));
    __m512i other = _mm512_set1_epi32(SIDE), shift = _mm512_set1_epi32(step); /* lanes of the second start at SIDE */
    __m512i upper = _mm512_mask_sub_epi32(lanes, right, _mm512_add_epi32(lanes, other), shift);
    __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, shift), right, lanes, other);
    for (int line = 0; line < SIDE; line++)
        if (!(line & step)) {
            __m512i first = lines[line], second = lines[line + step];
            lines[line] = _mm512_permutex2var_epi32(first, upper, second);
            lines[line + step] = _mm512_permutex2var_epi32(first, lower, second);
        }
}

/* Word w of line c becomes word c of line w, of which the first `count` go to `to`, `step` bytes from one to the next. */
INLINE void transpose(const Lanes from[SIDE], char *to, int64_t step, int64_t count) {
    __m512i lines[SIDE];
    for (int line = 0; line < SIDE; line++)
        lines[line] = (__m512i)from[line];
    exchange(lines, 1);
    exchange(lines, 2);
    exchange(lines, 4);
    exchange(lines, 8);
    for (int line = 0; line < SIDE; line++)
        if (line < count)
            _mm512_storeu_si512(to + line * step, lines[line]);
}
#else
enum { TOGETHER = 4 };

INLINE float sum(Lanes lanes) {
    float total = 0;
    for (int lane = 0; lane < SIDE; lane++)
        total += lanes[lane];
    return total;
}

INLINE Lanes silu(Lanes x) {
    for (int lane = 0; lane < SIDE; lane++)
        x[lane] /= 1 + expf(-x[lane]);
    return x;
}

INLINE void transpose(const Lanes from[SIDE], char *to, int64_t step, int64_t count) {
    for (int64_t line = 0; line < count && line < SIDE; line++)
        for (int word = 0; word < SIDE; word++)
            ((float *)(to + line * step))[word] = from[word][line];
}
#endif

#if defined(BFLOAT16)
INLINE __m256i rounded(Lanes lanes) {
    return (__m256i)_mm512_cvtneps_pbh((__m512)lanes);
}

/* sums + left * right, where a lane of left and right is two numbers */
INLINE Lanes add_pairs(Lanes sums, __m512i left, __m512i right) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#endif

/* ---- tiles ---- */

/* out[p] (16, 16) = 16 rows of weights, `bytes` of each, times panels[p], `count` of one or two */
INLINE void tile(int bfloat16, const char *weights, int64_t stride, const char *panels[2], int count, int64_t bytes,
                 float out[2][AREA]) {
    int rows = TOGETHER / count;
    for (int top = 0; top < SIDE; top += rows) {
        const char *left = weights + top * stride;
        Lanes sums[TOGETHER] = {{0}};
        for (int64_t at = 0; at < bytes; at += 4) {
            Lanes right[2] = {load(panels[0] + at * SIDE), load(panels[count - 1] + at * SIDE)};
            for (int row = 0; row < rows; row++) {
                const char *word = left + row * stride + at;
                for (int panel = 0; panel < count; panel++) {
                    Lanes *add = sums + row * count + panel;
#if defined(BFLOAT16)
                    if (bfloat16) {
                        *add = add_pairs(*add, _mm512_set1_epi32(*(const int *)word), (__m512i)right[panel]);
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

/*
 * What is left to do with tiles, in units. AMX multiplies beside the other units of a core, but does so only if their
 * instructions lie between its own. So each pair of tiles is multiplied while the pair before it is put away.
 */
typedef struct Rest Rest;
struct Rest {
    float out[2][2][AREA];                          /* tiles of two blocks of weights, times one or two panels */
    void (*put_away)(const Rest *rest, int unit);
    int unit, units, panels, bfloat16;
    char *to;                                       /* where the first number goes */
    int64_t step, next_panel, rows;                 /* bytes from line to line and panel to panel; rows of tokens */
};

INLINE void put_some_away(Rest *rest) {
    if (rest->unit < rest->units)
        rest->put_away(rest, rest->unit++);
}

static void put_away(Rest *rest) {
    while (rest->unit < rest->units)
        put_some_away(rest);
}

/* Two rows of silu(gate) * up, into a panel of the next product's; a unit for each two rows. */
static void put_activations(const Rest *rest, int unit) {
    for (int panel = 0; panel < rest->panels; panel++) {
        const float *gate = rest->out[0][panel] + unit * 2 * SIDE, *up = rest->out[1][panel] + unit * 2 * SIDE;
        char *to = rest->to + panel * rest->next_panel + unit * 2 * rest->step;
        Lanes even = silu(load(gate)) * load(up), odd = silu(load(gate + SIDE)) * load(up + SIDE);
#if defined(BFLOAT16)
        if (rest->bfloat16) {
            __m512i low = _mm512_cvtepu16_epi32(rounded(even)), high = _mm512_cvtepu16_epi32(rounded(odd));
            _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            continue;
        }
#endif
        store(to, even);
        store(to + rest->step, odd);
    }
}

/* A tile of outputs, to the rows of its tokens; a unit for each tile. */
static void put_outputs(const Rest *rest, int unit) {
    int panel = unit / 2, block = unit % 2;
    Lanes lines[SIDE];
    for (int line = 0; line < SIDE; line++)
        lines[line] = load(rest->out[block][panel] + line * SIDE);
    char *to = rest->to + panel * rest->next_panel + block * SIDE * 4;
    transpose(lines, to, rest->step, rest->rows - panel * SIDE);
}

#if defined(AMX)
/* Add the products of 64 bytes of each row. */
INLINE void add_amx(const char *first, const char *second, int64_t stride, const char *panels[2], int64_t at, int both) {
    _tile_loadd(4, first, stride);
    _tile_loadd(6, panels[0] + at * SIDE, 64);
    _tile_loadd(5, second, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (both) {
        _tile_loadd(7, panels[1] + at * SIDE, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* Fill rest->out with the blocks of weights times the panels; weights that lie `ahead` are fetched, unless it is 0. */
static void tiles_amx(const char *left[2], int64_t stride, const char *panels[2], int64_t bytes, int64_t ahead,
                      Rest *rest, Rest *before) {
    int both = rest->panels == 2;
    int64_t at = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; at + 64 <= bytes; at += 64) {
        if (ahead)
            for (int row = 0; row < SIDE; row++) {
                __builtin_prefetch(left[0] + at + row * stride + ahead, 0, 2);
                __builtin_prefetch(left[1] + at + row * stride + ahead, 0, 2);
            }
        add_amx(left[0] + at, left[1] + at, stride, panels, at, both);
        put_some_away(before);
    }
    if (at < bytes) {
        char ends[2][SIDE][64] __attribute__((aligned(64)));
        for (int block = 0; block < 2; block++)
            for (int row = 0; row < SIDE; row++)
                store(ends[block][row], load_some(left[block] + row * stride + at, bytes - at));
        add_amx(ends[0][0], ends[1][0], 64, panels, at, both);
    }
    _tile_stored(0, rest->out[0][0], 64);
    _tile_stored(1, rest->out[1][0], 64);
    if (both) {
        _tile_stored(2, rest->out[0][1], 64);
        _tile_stored(3, rest->out[1][1], 64);
    }
}
#endif

static void tiles(const char *left[2], int64_t stride, const char *panels[2], int64_t bytes, int64_t ahead, Rest *rest,
                  Rest *before) {
#if defined(AMX)
    if (rest->bfloat16) {
        tiles_amx(left, stride, panels, bytes, ahead, rest, before);
        put_away(before);
        return;
    }
#endif
    (void)ahead;
    put_away(before);
    for (int block = 0; block < 2; block++)
        if (rest->bfloat16 && rest->panels == 2)
            tile(1, left[block], stride, panels, 2, bytes, rest->out[block]);
        else if (rest->bfloat16)
            tile(1, left[block], stride, panels, 1, bytes, rest->out[block]);
        else if (rest->panels == 2)
            tile(0, left[block], stride, panels, 2, bytes, rest->out[block]);
        else
            tile(0, left[block], stride, panels, 1, bytes, rest->out[block]);
}

/* `bytes`, filled up to a multiple of 64. */
INLINE int64_t whole(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* The task's rows, `most` panels at a time. */
static void multiply_panels(const Problem *problem, Task task, int64_t from, int64_t to, char *space, int64_t most) {
    int bfloat16 = problem->bfloat16, itemsize = bfloat16 ? 2 : 4;
    int64_t width = problem->width, hidden_bytes = width * itemsize, inner_bytes = (to - from) * itemsize;
    int64_t input_panel = whole(hidden_bytes) * SIDE, inner_panel = whole(inner_bytes) * SIDE;
    char *inputs = space, *inners = space + most * input_panel;
    const char *gates = problem->first + task.expert * problem->first_expert;
    const char *downs = problem->down + task.expert * problem->down_expert + from * itemsize;
    Rest rests[2] __attribute__((aligned(64)));
    for (int64_t start = task.start; start < task.stop; start += most * SIDE) {
        int64_t count = task.stop - start < most * SIDE ? task.stop - start : most * SIDE;
        int64_t panels = (count + SIDE - 1) / SIDE;
        for (int64_t panel = 0; panel < panels; panel++) {
            const char *tokens[SIDE];
            for (int column = 0; column < SIDE; column++) { /* where there are no more, the last again, to no use */
                int64_t row = start + panel * SIDE + column, last = start + count - 1;
                tokens[column] = problem->hidden + problem->slots[row < last ? row : last] / problem->top_k * hidden_bytes;
            }
            for (int64_t at = 0; at < hidden_bytes; at += 64) {
                Lanes lines[SIDE];
                for (int column = 0; column < SIDE; column++)
                    lines[column] = load_some(tokens[column] + at, hidden_bytes - at);
                transpose(lines, inputs + panel * input_panel + at * SIDE, 64, SIDE);
            }
            /* what follows the inner numbers of a panel is multiplied too, with zeros */
            memset(inners + panel * inner_panel + inner_bytes * SIDE, 0, inner_panel - inner_bytes * SIDE);
        }
        int turn = 0;
        rests[1].unit = rests[1].units = 0;
        for (int64_t next = from; next < to; next += SIDE) {
            int64_t row = next < to - SIDE ? next : to - SIDE; /* the last ones may be made twice */
            const char *gate = gates + row * problem->first_row;
            const char *left[2] = {gate, gate + problem->inner * problem->first_row};
            for (int64_t panel = 0; panel < panels; panel += 2, turn ^= 1) {
                const char *right[2] = {inputs + panel * input_panel, inputs + (panel + 1) * input_panel};
                Rest *rest = rests + turn;
                rest->bfloat16 = bfloat16;
                rest->panels = panel + 1 < panels ? 2 : 1;
                tiles(left, problem->first_row, right, hidden_bytes, panel ? 0 : SIDE * problem->first_row, rest,
                      rests + !turn);
                rest->put_away = put_activations;
                rest->unit = 0;
                rest->units = SIDE / 2;
                rest->to = inners + panel * inner_panel + (row - from) * SIDE * itemsize;
                rest->step = SIDE * itemsize;
                rest->next_panel = inner_panel;
            }
        }
        put_away(rests + !turn);
        float *rows = problem->rows + (task.part * problem->tokens * problem->top_k + start) * width;
        for (int64_t next = 0; next < width; next += 2 * SIDE) {
            int64_t row = next < width - 2 * SIDE ? next : width - 2 * SIDE;
            const char *left[2] = {downs + row * problem->down_row, downs + (row + SIDE) * problem->down_row};
            for (int64_t panel = 0; panel < panels; panel += 2, turn ^= 1) {
                const char *right[2] = {inners + panel * inner_panel, inners + (panel + 1) * inner_panel};
                Rest *rest = rests + turn;
                rest->bfloat16 = bfloat16;
                rest->panels = panel + 1 < panels ? 2 : 1;
                tiles(left, problem->down_row, right, inner_bytes, panel ? 0 : 2 * SIDE * problem->down_row, rest,
                      rests + !turn);
                rest->put_away = put_outputs;
                rest->unit = 0;
                rest->units = 2 * rest->panels;
                rest->to = (char *)(rows + panel * SIDE * width + row);
                rest->step = width * 4;
                rest->next_panel = SIDE * width * 4;
                rest->rows = count - panel * SIDE;
            }
        }
        put_away(rests + !turn);
    }
}

/* ---- few tokens ---- */

/* out[c][r] = row r of 16 of the weights times vector c of `count` */
INLINE void rows_times(int bfloat16, const char *weights, int64_t stride, const char *vectors[FEW], int count,
                       int64_t bytes, float out[FEW][SIDE]) {
    for (int top = 0; top < SIDE; top += 4) {
        const char *left = weights + top * stride;
        Lanes sums[4][FEW] = {{{0}}};
        for (int64_t at = 0; at < bytes; at += 64)
            for (int row = 0; row < 4; row++) {
                Lanes word = load_some(left + row * stride + at, bytes - at);
                __builtin_prefetch(left + (row + 8) * stride + at);
                for (int vector = 0; vector < count; vector++) {
                    Lanes right = load_some(vectors[vector] + at, bytes - at);
#if defined(BFLOAT16)
                    if (bfloat16) {
                        sums[row][vector] = add_pairs(sums[row][vector], (__m512i)word, (__m512i)right);
                        continue;
                    }
#endif
                    sums[row][vector] += word * right;
                }
            }
        for (int row = 0; row < 4; row++)
            for (int vector = 0; vector < count; vector++)
                out[vector][top + row] = sum(sums[row][vector]);
    }
    (void)bfloat16;
}

INLINE void multiply_vectors(const Problem *problem, Task task, int64_t from, int64_t to, char *space, int bfloat16,
                             int count) {
    int itemsize = bfloat16 ? 2 : 4;
    int64_t width = problem->width, hidden_bytes = width * itemsize, inner_bytes = (to - from) * itemsize;
    const char *gates = problem->first + task.expert * problem->first_expert;
    const char *downs = problem->down + task.expert * problem->down_expert + from * itemsize;
    const char *inputs[FEW], *inners[FEW];
    for (int vector = 0; vector < count; vector++) {
        inputs[vector] = problem->hidden + problem->slots[task.start + vector] / problem->top_k * hidden_bytes;
        inners[vector] = space + vector * inner_bytes;
    }
    float gate[FEW][SIDE], up[FEW][SIDE];
    for (int64_t next = from; next < to; next += SIDE) {
        int64_t row = next < to - SIDE ? next : to - SIDE;
        const char *left = gates + row * problem->first_row;
        rows_times(bfloat16, left, problem->first_row, inputs, count, hidden_bytes, gate);
        left += problem->inner * problem->first_row;
        rows_times(bfloat16, left, problem->first_row, inputs, count, hidden_bytes, up);
        for (int vector = 0; vector < count; vector++) {
            Lanes inner = silu(load(gate[vector])) * load(up[vector]);
            char *to_there = space + vector * inner_bytes + (row - from) * itemsize;
#if defined(BFLOAT16)
            if (bfloat16) {
                _mm256_storeu_si256((__m256i *)to_there, rounded(inner));
                continue;
            }
#endif
            store(to_there, inner);
        }
    }
    float *rows = problem->rows + (task.part * problem->tokens * problem->top_k + task.start) * width;
    for (int64_t next = 0; next < width; next += SIDE) {
        int64_t row = next < width - SIDE ? next : width - SIDE;
        rows_times(bfloat16, downs + row * problem->down_row, problem->down_row, inners, count, inner_bytes, gate);
        for (int vector = 0; vector < count; vector++)
            store(rows + vector * width + row, load(gate[vector]));
    }
}

/* ---- what threads do ---- */

static __thread char *space; /* kept from call to call: new memory would be mapped each time */
static __thread int64_t space_bytes;

static void multiply(const Problem *problem, Task task, int64_t most) {
    int64_t blocks = problem->inner / 32, last = task.part + 1 == problem->parts;
    int64_t from = blocks * task.part / problem->parts * 32;
    int64_t to = last ? problem->inner : blocks * (task.part + 1) / problem->parts * 32;
    int64_t count = task.stop - task.start;
#define VECTORS(number)                                                             \
    case number:                                                                    \
        if (problem->bfloat16)                                                      \
            multiply_vectors(problem, task, from, to, space, 1, number);            \
        else                                                                        \
            multiply_vectors(problem, task, from, to, space, 0, number);            \
        return;
    switch (count) { /* the compiler keeps that many sums in registers */
        VECTORS(1)
        VECTORS(2)
        VECTORS(3)
        VECTORS(4)
    }
    multiply_panels(problem, task, from, to, space, most);
}

static void multiply_tasks(void *argument) {
    Work *work = argument;
    const Problem *problem = work->problem;
    int64_t numbers = problem->width + problem->inner / problem->parts + 4 * 32; /* of a column, at most */
    int64_t panel = numbers * SIDE * (problem->bfloat16 ? 2 : 4), most = SPACE / panel / 2 * 2;
    most = most < 2 ? 2 : most > MOST / SIDE ? MOST / SIDE : most;
    if (space_bytes < most * panel) {
        free(space);
        space = aligned_alloc(64, most * panel);
        space_bytes = space ? most * panel : 0;
    }
    if (!space) {
        work->failed = 1;
        return;
    }
#if defined(AMX)
    char before[64] __attribute__((aligned(64))), all[64] __attribute__((aligned(64))) = {1};
    if (problem->bfloat16) {
        _tile_storeconfig(before); /* oneDNN may have left its own */
        for (int number = 0; number < 8; number++) {
            all[16 + 2 * number] = 64; /* bytes of a row */
            all[48 + number] = SIDE;   /* rows */
        }
        _tile_loadconfig(all);
    }
#endif
    int64_t next;
    while ((next = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        multiply(problem, work->tasks[next], most);
#if defined(AMX)
    if (problem->bfloat16) {
        if (before[0])
            _tile_loadconfig(before);
        else
            _tile_release();
    }
#endif
}

static void sum_tokens(void *argument) {
    Work *work = argument;
    const Problem *problem = work->problem;
    int64_t width = problem->width, top_k = problem->top_k, next;
    while ((next = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        for (int64_t token = next * SUMMED; token < (next + 1) * SUMMED && token < problem->tokens; token++)
            for (int64_t next = 0; next < width; next += SIDE) {
                int64_t at = next < width - SIDE ? next : width - SIDE;
                Lanes total = {0};
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; slot++) {
                    if (problem->places[slot] < 0)
                        continue;
                    const float *row = problem->rows + problem->places[slot] * width + at;
                    Lanes parts = load(row);
                    for (int64_t part = 1; part < problem->parts; part++)
                        parts += load(row + part * problem->tokens * top_k * width);
                    total += problem->scales[slot] * parts;
                }
#if defined(BFLOAT16)
                if (problem->bfloat16) {
                    _mm256_storeu_si256((__m256i *)(problem->output + (token * width + at) * 2), rounded(total));
                    continue;
                }
#endif
                store(problem->output + (token * width + at) * 4, total);
            }
}

static void share(void (*region)(void *), Work *work) {
    int64_t threads = work->problem->threads < work->count ? work->problem->threads : work->count;
    if (threads > 1)
        work->problem->parallel(region, work, (unsigned)threads, 0);
    else
        region(work);
}

/* ---- what native.py calls ---- */

/* The dtypes that are multiplied here: 1 for float32, and 2 for bfloat16. */
int mhmoe_dtypes(void) {
#if defined(AMX)
    /* the system is asked for leave to use the tiles: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, 0x1023, 18) ? 1 : 1 + 2;
#elif defined(BFLOAT16)
    return 1 + 2;
#else
    return 1;
#endif
}

/* Fill problem->output; 1 where there is no memory, else 0. */
int mhmoe_experts(const Problem *problem) {
    int64_t experts = problem->experts, count = problem->tokens * problem->top_k, tasks = 0, *starts = problem->starts;
    memset(starts, 0, (experts + 1) * sizeof *starts);
    for (int64_t slot = 0; slot < count; slot++)
        if ((uint64_t)problem->index[slot] < (uint64_t)experts)
            starts[problem->index[slot] + 1]++;
    for (int64_t expert = 0; expert < experts; expert++) {
        tasks += (starts[expert + 1] + MOST - 1) / MOST * problem->parts;
        starts[expert + 1] += starts[expert];
    }
    Task *list = malloc((tasks + 1) * sizeof *list);
    if (!list)
        return 1;
    Work work = {.problem = problem, .tasks = list};
    for (int64_t expert = 0; expert < experts; expert++)
        for (int64_t start = starts[expert]; start < starts[expert + 1]; start += MOST)
            for (int64_t part = 0; part < problem->parts; part++) {
                int64_t stop = start + MOST < starts[expert + 1] ? start + MOST : starts[expert + 1];
                list[work.count++] = (Task){expert, start, stop, part};
            }
    for (int64_t slot = 0; slot < count; slot++) {
        int64_t expert = problem->index[slot];
        problem->places[slot] = (uint64_t)expert < (uint64_t)experts ? starts[expert]++ : -1;
        if (problem->places[slot] >= 0)
            problem->slots[problem->places[slot]] = slot;
    }
    share(multiply_tasks, &work);
    free(list);
    if (work.failed)
        return 1;
    work.next = 0;
    work.count = (problem->tokens + SUMMED - 1) / SUMMED;
    share(sum_tokens, &work);
    return 0;
}
