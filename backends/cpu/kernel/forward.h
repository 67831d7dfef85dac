/* An expert's outputs. With up to FEW rows, reading the weights takes longest, and products are made without panels. */

#include "layer.h"

enum {
    FEW = 4,
    MOST = 256,      /* rows that a task takes */
    SPACE = 1 << 20, /* bytes of panels: what stays in a core's cache, beside weights */
};

/* Two rows of activation(gate) * up, into a panel of the next product's; a unit for each two rows. */
static void put_gated(const Rest *rest, int unit) {
    for (int panel = 0; panel < rest->panels; panel++) {
        const float *gate = rest->out[0][panel] + unit * 2 * SIDE, *up = rest->out[1][panel] + unit * 2 * SIDE;
        Lanes even = activation(rest->activation, load(gate), NULL) * load(up);
        Lanes odd = activation(rest->activation, load(gate + SIDE), NULL) * load(up + SIDE);
        char *to = rest->to + panel * rest->next + unit * 2 * rest->step;
        store_pair(rest->bfloat16, to, rest->step, even, odd);
    }
}

/* The same without gates: of the second block's rows, too. */
static void put_plain(const Rest *rest, int unit) {
    int block = unit / 8, line = unit % 8 * 2;
    for (int panel = 0; panel < rest->panels; panel++) {
        const float *up = rest->out[block][panel] + line * SIDE;
        Lanes even = activation(rest->activation, load(up), NULL);
        Lanes odd = activation(rest->activation, load(up + SIDE), NULL);
        char *to = rest->to + panel * rest->next + (block * SIDE + line) * rest->step;
        store_pair(rest->bfloat16, to, rest->step, even, odd);
    }
}

/* The task's rows, in `most` panels at a time. */
static void multiply_panels(const Problem *problem, Task whole_task, int64_t most) {
    int bfloat16 = problem->bfloat16, itemsize = bfloat16 ? 2 : 4;
    int64_t from = begin_of(problem, whole_task.part), to = begin_of(problem, whole_task.part + 1);
    int64_t width = problem->width, hidden_bytes = width * itemsize, inner_bytes = (to - from) * itemsize;
    int64_t input_panel = whole(hidden_bytes) * SIDE, inner_panel = whole(inner_bytes) * SIDE;
    int64_t first_row = problem->first_row, down_row = problem->down_row;
    char *inputs = space, *inners = space + most * input_panel;
    const char *firsts = problem->first + whole_task.expert * problem->first_expert;
    const char *downs = problem->down + whole_task.expert * problem->down_expert + from * itemsize;
    /* two blocks are 16 gates and ups, or 32 rows of the one matrix */
    int64_t made = problem->gated ? SIDE : 2 * SIDE, second = problem->gated ? problem->inner : SIDE;
    Rest rests[2] __attribute__((aligned(64)));
    for (Task task = whole_task; task.start < whole_task.stop; task.start = task.stop) {
        task.stop = least(task.start + most * SIDE, whole_task.stop);
        int64_t panels = (task.stop - task.start + SIDE - 1) / SIDE;
        make_panels(problem, problem->hidden, task.start, task.stop - task.start, inputs);
        for (int64_t panel = 0; panel < panels; panel++) /* what follows the inner numbers is multiplied, too */
            memset(inners + panel * inner_panel + inner_bytes * SIDE, 0, inner_panel - inner_bytes * SIDE);
        int turn = 0;
        rests[1].unit = rests[1].units = 0;
        for (int64_t next = from; next < to; next += made) {
            int64_t row = least(next, to - made); /* the last ones may be made twice */
            const char *left[2] = {firsts + row * first_row, firsts + (row + second) * first_row};
            for (int64_t panel = 0; panel < panels; panel += 2, turn ^= 1) {
                const char *right[2] = {inputs + panel * input_panel, inputs + (panel + 1) * input_panel};
                Rest *rest = next_rest(rests + turn, bfloat16, panels - panel);
                tiles(left, first_row, right, 64, hidden_bytes, panel ? 0 : made * first_row, rest, rests + !turn);
                rest->put_away = problem->gated ? put_gated : put_plain;
                rest->activation = problem->activation;
                rest->unit = 0;
                rest->units = made / 2;
                rest->to = inners + panel * inner_panel + (row - from) * SIDE * itemsize;
                rest->step = SIDE * itemsize;
                rest->next = inner_panel;
            }
        }
        put_away(rests + !turn);
        for (int64_t next = 0; next < width; next += 2 * SIDE) {
            int64_t row = least(next, width - 2 * SIDE);
            const char *left[2] = {downs + row * down_row, downs + (row + SIDE) * down_row};
            for (int64_t panel = 0; panel < panels; panel += 2, turn ^= 1) {
                const char *right[2] = {inners + panel * inner_panel, inners + (panel + 1) * inner_panel};
                Rest *rest = next_rest(rests + turn, bfloat16, panels - panel);
                tiles(left, down_row, right, 64, inner_bytes, panel ? 0 : 2 * SIDE * down_row, rest, rests + !turn);
                to_rows(rest, problem, task, panel * SIDE, row);
            }
        }
        put_away(rests + !turn);
    }
}

/* out[c][r] = row r of 16 times vector c of `count` */
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

INLINE void multiply_vectors(const Problem *problem, Task task, int bfloat16, int count) {
    int itemsize = bfloat16 ? 2 : 4;
    int64_t from = begin_of(problem, task.part), to = begin_of(problem, task.part + 1);
    int64_t width = problem->width, inner_bytes = (to - from) * itemsize;
    const char *firsts = problem->first + task.expert * problem->first_expert;
    const char *downs = problem->down + task.expert * problem->down_expert + from * itemsize;
    const char *inputs[FEW], *inners[FEW];
    for (int vector = 0; vector < count; vector++) {
        inputs[vector] = token_of(problem, problem->hidden, task.start + vector);
        inners[vector] = space + vector * whole(inner_bytes);
    }
    float gate[FEW][SIDE], up[FEW][SIDE];
    for (int64_t next = from; next < to; next += SIDE) {
        int64_t row = least(next, to - SIDE);
        const char *left = firsts + row * problem->first_row;
        rows_times(bfloat16, left, problem->first_row, inputs, count, width * itemsize, gate);
        left += problem->inner * problem->first_row;
        if (problem->gated)
            rows_times(bfloat16, left, problem->first_row, inputs, count, width * itemsize, up);
        for (int vector = 0; vector < count; vector++) {
            Lanes inner = activation(problem->activation, load(gate[vector]), NULL);
            if (problem->gated)
                inner *= load(up[vector]);
            store_as(bfloat16, space + vector * whole(inner_bytes) + (row - from) * itemsize, inner);
        }
    }
    float *rows = problem->rows + (task.part * problem->tokens * problem->top_k + task.start) * width;
    for (int64_t next = 0; next < width; next += SIDE) {
        int64_t row = least(next, width - SIDE);
        rows_times(bfloat16, downs + row * problem->down_row, problem->down_row, inners, count, inner_bytes, gate);
        for (int vector = 0; vector < count; vector++)
            store(rows + vector * width + row, load(gate[vector]));
    }
}

/* 0 where there is no memory. */
static int multiply(const Problem *problem, Task task) {
    int64_t numbers = problem->width + problem->inner / problem->parts + 4 * 32; /* of a panel's column, at most */
    int64_t panel = numbers * SIDE * (problem->bfloat16 ? 2 : 4);
    int64_t most = least(SPACE / panel / 2 * 2, MOST / SIDE);
    most = most < 2 ? 2 : most;
    if (!has_space(most * panel))
        return 0;
#define VECTORS(number)                                    \
    case number:                                           \
        if (problem->bfloat16)                             \
            multiply_vectors(problem, task, 1, number);    \
        else                                               \
            multiply_vectors(problem, task, 0, number);    \
        return 1;
    switch (task.stop - task.start) { /* the compiler keeps that many sums in registers */
        VECTORS(1)
        VECTORS(2)
        VECTORS(3)
        VECTORS(4)
    }
    multiply_panels(problem, task, most);
    return 1;
}
