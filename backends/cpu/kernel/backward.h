/*
 * The gradients of an expert. Its first product is made again, which takes less time than to write and read it.
 *
 * With a row's token x, gate g, up u, a(g) the activation, inner y = a(g) u, weight w, and the gradient z of its
 * token's output: y' = down^T z, then
 *
 *     w' = y . y'     u' = w y' a(g)     g' = w y' u a'(g)     x' = first^T (g', u')
 *     first' = (g', u') x^T     down' = z (w y)^T, summed over rows
 *
 * Without gates, g is the one that there is, and 1 stands for u. For x', numbers of a row are words side by side, in
 * panels; for first' and down' the same number of all rows.
 */

#include "forward.h"

/* What a task has in `space`. */
typedef struct {
    char *inputs, *grads;             /* panels of x and z */
    char *lines;                      /* panels of 16 numbers of all rows, of x or z; see make_lines */
    char *products;                   /* (1 + matrices, inner, rows): w y, g', u' */
    char *changes;                    /* panels of (g', u') */
    char *turned;                     /* two blocks of 16 rows of a transposed weight */
    float *scales, *grad_scales;      /* (rows,): w, and w' */
    int64_t rows, bytes;              /* rows, filled up to a multiple of 64 bytes; bytes of all */
} Room;

/* In `first`. */
INLINE int64_t matrices_of(const Problem *problem) {
    return problem->gated ? 2 : 1;
}

static Room room_of(const Problem *problem, Task task) {
    int64_t itemsize = problem->bfloat16 ? 2 : 4, part = begin_of(problem, task.part + 1) - begin_of(problem, task.part);
    int64_t rows = whole((task.stop - task.start) * itemsize) / itemsize, width = problem->width;
    int64_t changes = matrices_of(problem) * part;
    Room room = {.rows = rows};
    char *next = space;
    room.inputs = next, next += rows * whole(width * itemsize);
    room.grads = next, next += rows * whole(width * itemsize);
    room.lines = next, next += (width + SIDE - 1) / SIDE * SIDE * rows * itemsize;
    room.products = next, next += (part + changes) * rows * itemsize;
    room.changes = next, next += rows * whole(changes * itemsize);
    room.turned = next, next += 2 * SIDE * whole((width > changes ? width : changes) * itemsize);
    room.scales = (float *)next, next += rows * 4;
    room.grad_scales = (float *)next, next += rows * 4;
    room.bytes = next - space;
    return room;
}

/* The first number of a panel of 16: the last panel may have some of the one before it. */
INLINE int64_t column_of(const Problem *problem, int64_t panel) {
    return least(panel * SIDE, problem->width - SIDE);
}

/*
 * The tokens of the task's rows one below the other, in panels of 16 numbers; in bfloat16 a word is a number of two
 * rows. Zeros are below.
 */
static void make_lines(const Problem *problem, const char *tokens, Task task, const Room *room) {
    int64_t there = task.stop - task.start, together = problem->bfloat16 ? 2 : 1, lines = room->rows / together;
    for (int64_t line = 0; line < lines; line++) {
        const char *from[2] = {NULL, NULL};
        for (int64_t row = line * together; row < least((line + 1) * together, there); row++)
            from[row % together] = token_of(problem, tokens, task.start + row);
        for (int64_t panel = 0; panel * SIDE < problem->width; panel++) {
            int64_t column = column_of(problem, panel);
            char *to = room->lines + (panel * lines + line) * 64;
#if defined(BFLOAT16)
            if (problem->bfloat16) {
                __m256i none = _mm256_setzero_si256();
                store(to, paired(from[0] ? _mm256_loadu_si256((const __m256i *)(from[0] + column * 2)) : none,
                                 from[1] ? _mm256_loadu_si256((const __m256i *)(from[1] + column * 2)) : none));
                continue;
            }
#endif
            store(to, from[0] ? load(from[0] + column * 4) : (Lanes){0});
        }
    }
}

/* 16 columns of `rows` rows of a matrix, from `matrix` on, as rows that begin `step` bytes from each other. */
static void turn(int bfloat16, const char *matrix, int64_t stride, int64_t rows, char *to, int64_t step) {
    int64_t together = bfloat16 ? 2 * SIDE : SIDE;
    for (int64_t next = 0; next < rows; next += together) {
        int64_t row = least(next, rows - together);
        Lanes lines[SIDE];
        for (int line = 0; line < SIDE; line++) {
#if defined(BFLOAT16)
            if (bfloat16) {
                const char *even = matrix + (row + 2 * line) * stride;
                lines[line] = paired(_mm256_loadu_si256((const __m256i *)even),
                                     _mm256_loadu_si256((const __m256i *)(even + stride)));
                continue;
            }
#endif
            lines[line] = load(matrix + (row + line) * stride);
        }
        transpose(lines, to + row * (bfloat16 ? 2 : 4), step, SIDE);
    }
}

/* Where put_changes finds and leaves what belongs to 32 inner numbers, and one or two panels. */
typedef struct {
    Rest gates, ups, inners; /* g, u and y' */
    const Room *room;
    int64_t row, first, part, panel; /* of these numbers, the first that is not done yet; all of the task; the panel */
    int64_t activation, gated;
} Changes;

/* Two rows of g' and u', in both orders, and of w y; and what they add to w'. */
static void put_changes(const Rest *rest, int unit) {
    const Changes *changes = (const Changes *)((const char *)rest - offsetof(Changes, inners));
    const Room *room = changes->room;
    int bfloat16 = rest->bfloat16, itemsize = bfloat16 ? 2 : 4, block = unit / 8, line = unit % 8 * 2;
    int64_t part = changes->part, row = changes->row + unit * 2, bytes = (changes->gated ? 2 : 1) * part * itemsize;
    if (row < changes->first)
        return;
    for (int panel = 0; panel < rest->panels; panel++) {
        int64_t column = (changes->panel + panel) * SIDE;
        Lanes scales = load(room->scales + column), total = load(room->grad_scales + column);
        Lanes gate[2], up[2];
        for (int of = 0; of < 2; of++) {
            int at = (line + of) * SIDE;
            Lanes slope, y = load(changes->inners.out[block][panel] + at);
            Lanes inner = activation(changes->activation, load(changes->gates.out[block][panel] + at), &slope);
            up[of] = inner;
            if (changes->gated) {
                Lanes u = load(changes->ups.out[block][panel] + at);
                inner *= u;
                slope *= u;
            }
            total += inner * y;
            y *= scales;
            gate[of] = y * slope;
            up[of] *= y;
            char *to = room->products + ((row + of) * room->rows + column) * itemsize;
            store_as(bfloat16, to, scales * inner);
            store_as(bfloat16, to + part * room->rows * itemsize, gate[of]);
            if (changes->gated)
                store_as(bfloat16, to + 2 * part * room->rows * itemsize, up[of]);
        }
        store(room->grad_scales + column, total);
        char *panels = room->changes + (changes->panel + panel) * SIDE * whole(bytes);
        store_pair(bfloat16, panels + row * SIDE * itemsize, SIDE * itemsize, gate[0], gate[1]);
        if (changes->gated)
            store_pair(bfloat16, panels + (part + row) * SIDE * itemsize, SIDE * itemsize, up[0], up[1]);
    }
}

/* g', u', w y and w' */
static void make_changes(const Problem *problem, Task task, const Room *room) {
    int bfloat16 = problem->bfloat16, itemsize = bfloat16 ? 2 : 4;
    int64_t from = begin_of(problem, task.part), to = begin_of(problem, task.part + 1), width = problem->width;
    int64_t bytes = width * itemsize, panel_bytes = whole(bytes) * SIDE, first_row = problem->first_row;
    int64_t panels = (task.stop - task.start + SIDE - 1) / SIDE, step = whole(bytes);
    const char *gates = problem->first + task.expert * problem->first_expert;
    const char *downs = problem->down + task.expert * problem->down_expert;
    Changes both[2] __attribute__((aligned(64)));
    int turns = 0;
    both[1].inners.unit = both[1].inners.units = 0;
    for (int64_t next = from; next < to; next += 2 * SIDE) {
        int64_t row = least(next, to - 2 * SIDE);
        for (int block = 0; block < 2; block++)
            turn(bfloat16, downs + (row + block * SIDE) * itemsize, problem->down_row, width,
                 room->turned + block * SIDE * step, step);
        const char *gate = gates + row * first_row, *up = gates + (problem->inner + row) * first_row;
        const char *left[3][2] = {{gate, gate + SIDE * first_row},
                                  {up, up + SIDE * first_row},
                                  {room->turned, room->turned + SIDE * step}};
        for (int64_t panel = 0; panel < panels; panel += 2, turns ^= 1) {
            Changes *changes = both + turns;
            Rest *rests[3] = {&changes->gates, &changes->ups, &changes->inners}, *before = &both[!turns].inners;
            for (int of = 0; of < 3; of++) {
                if (rests[of] == &changes->ups && !problem->gated)
                    continue;
                const char *tokens = (of < 2 ? room->inputs : room->grads) + panel * panel_bytes;
                const char *right[2] = {tokens, tokens + panel_bytes};
                Rest *rest = next_rest(rests[of], bfloat16, panels - panel);
                int64_t ahead = of < 2 && !panel ? 2 * SIDE * first_row : 0;
                tiles(left[of], of < 2 ? first_row : step, right, 64, bytes, ahead, rest, before);
            }
            changes->room = room;
            changes->row = row - from;
            changes->first = next - from;
            changes->part = to - from;
            changes->panel = panel;
            changes->activation = problem->activation;
            changes->gated = problem->gated;
            changes->inners.put_away = put_changes;
            changes->inners.unit = 0;
            changes->inners.units = SIDE;
        }
    }
    put_away(&both[!turns].inners);
}

/* x', of parts of experts */
static void make_inputs(const Problem *problem, Task task, const Room *room) {
    int bfloat16 = problem->bfloat16, itemsize = bfloat16 ? 2 : 4;
    int64_t from = begin_of(problem, task.part), part = begin_of(problem, task.part + 1) - from;
    int64_t bytes = matrices_of(problem) * part * itemsize, panel_bytes = whole(bytes) * SIDE, step = whole(bytes);
    int64_t panels = (task.stop - task.start + SIDE - 1) / SIDE, first_row = problem->first_row;
    const char *gates = problem->first + task.expert * problem->first_expert + from * first_row;
    const char *left[2] = {room->turned, room->turned + SIDE * step};
    Rest rests[2] __attribute__((aligned(64)));
    int turns = 0;
    rests[1].unit = rests[1].units = 0;
    for (int64_t next = 0; next < problem->width; next += 2 * SIDE) {
        int64_t column = least(next, problem->width - 2 * SIDE);
        for (int block = 0; block < 2; block++) {
            const char *at = gates + (column + block * SIDE) * itemsize;
            char *turned = room->turned + block * SIDE * step;
            turn(bfloat16, at, first_row, part, turned, step);
            if (problem->gated)
                turn(bfloat16, at + problem->inner * first_row, first_row, part, turned + part * itemsize, step);
        }
        for (int64_t panel = 0; panel < panels; panel += 2, turns ^= 1) {
            const char *changes = room->changes + panel * panel_bytes;
            const char *right[2] = {changes, changes + panel_bytes};
            Rest *rest = next_rest(rests + turns, bfloat16, panels - panel);
            tiles(left, step, right, 64, bytes, 0, rest, rests + !turns);
            to_rows(rest, problem, task, panel * SIDE, column);
        }
    }
    put_away(rests + !turns);
}

/* Rows of a block to those of a gradient; a unit for each tile. */
static void put_rows(const Rest *rest, int unit) {
    int panel = unit / 2, block = unit % 2;
    for (int line = 0; line < SIDE; line++)
        store_as(!rest->float32, rest->to + (block * SIDE + line) * rest->step + panel * rest->next,
                 load(rest->out[block][panel] + line * SIDE));
}

/* The same with blocks and panels exchanged. */
static void put_columns(const Rest *rest, int unit) {
    int panel = unit / 2, block = unit % 2;
    float lines[SIDE][SIDE];
    Lanes from[SIDE];
    for (int line = 0; line < SIDE; line++)
        from[line] = load(rest->out[block][panel] + line * SIDE);
    transpose(from, (char *)lines, SIDE * 4, SIDE);
    char *to = rest->to + panel * rest->next + block * SIDE * (rest->float32 ? 4 : 2);
    for (int line = 0; line < SIDE; line++)
        store_as(!rest->float32, to + line * rest->step, load(lines[line]));
}

/* One of the parts of first' and down': rows of `products` times room->lines, to `gradient`. */
static void make_gradient(const Problem *problem, const Room *room, int64_t part, const char *products, char *gradient,
                          int64_t stride, int columns) {
    int bfloat16 = problem->bfloat16, itemsize = bfloat16 ? 2 : 4, size = problem->float32_gradients ? 4 : itemsize;
    int64_t bytes = room->rows * itemsize, panels = (problem->width + SIDE - 1) / SIDE;
    Rest rests[2] __attribute__((aligned(64)));
    int turns = 0;
    rests[1].unit = rests[1].units = 0;
    for (int64_t next = 0; next < part; next += 2 * SIDE) {
        int64_t row = least(next, part - 2 * SIDE);
        const char *left[2] = {products + row * bytes, products + (row + SIDE) * bytes};
        for (int64_t panel = 0; panel < panels; panel += 2, turns ^= 1) {
            const char *right[2] = {room->lines + panel * SIDE * bytes, room->lines + (panel + 1) * SIDE * bytes};
            int64_t column = column_of(problem, panel), distance = column_of(problem, panel + 1) - column;
            Rest *rest = next_rest(rests + turns, bfloat16, panels - panel);
            rest->float32 = size == 4;
            tiles(left, bytes, right, 64, bytes, 0, rest, rests + !turns);
            rest->put_away = columns ? put_columns : put_rows;
            rest->unit = 0;
            rest->units = 2 * rest->panels;
            rest->to = gradient + (columns ? column * stride + row * size : row * stride + column * size);
            rest->step = stride;
            rest->next = distance * (columns ? stride : size);
        }
    }
    put_away(rests + !turns);
}

/* 0 where there is no memory. */
static int differentiate(const Problem *problem, Task task) {
    if (!has_space(room_of(problem, task).bytes))
        return 0;
    Room room = room_of(problem, task);
    int itemsize = problem->bfloat16 ? 2 : 4, size = problem->float32_gradients ? 4 : itemsize;
    int64_t from = begin_of(problem, task.part), part = begin_of(problem, task.part + 1) - from;
    int64_t rows = task.stop - task.start, block = part * room.rows * itemsize;
    int64_t matrices = matrices_of(problem), bytes = matrices * part * itemsize;
    memset(room.products, 0, (1 + matrices) * block); /* of rows that are not there */
    for (int64_t panel = 0; panel < room.rows * whole(bytes); panel += SIDE * whole(bytes)) /* and below the numbers */
        memset(room.changes + panel + SIDE * bytes, 0, SIDE * (whole(bytes) - bytes));
    memset(room.grad_scales, 0, room.rows * 4);
    for (int64_t row = 0; row < room.rows; row++)
        room.scales[row] = row < rows ? problem->scales[problem->slots[task.start + row]] : 0;
    make_panels(problem, problem->hidden, task.start, rows, room.inputs);
    make_panels(problem, problem->grad_output, task.start, rows, room.grads);
    make_changes(problem, task, &room);
    if (problem->grad_scales)
        for (int64_t row = 0; row < rows; row++) {
            int64_t slot = problem->slots[task.start + row];
            problem->grad_scales[task.part * problem->tokens * problem->top_k + slot] = room.grad_scales[row];
        }
    if (problem->output)
        make_inputs(problem, task, &room);
    if (problem->grad_first) {
        char *gradient = problem->grad_first + task.expert * problem->grad_first_expert;
        int64_t stride = problem->grad_first_row;
        make_lines(problem, problem->hidden, task, &room);
        make_gradient(problem, &room, part, room.products + block, gradient + from * stride, stride, 0);
        gradient += (problem->inner + from) * stride;
        if (problem->gated)
            make_gradient(problem, &room, part, room.products + 2 * block, gradient, stride, 0);
    }
    if (problem->grad_down) {
        char *gradient = problem->grad_down + task.expert * problem->grad_down_expert + from * size;
        make_lines(problem, problem->grad_output, task, &room);
        make_gradient(problem, &room, part, room.products, gradient, problem->grad_down_row, 1);
    }
    return 1;
}
