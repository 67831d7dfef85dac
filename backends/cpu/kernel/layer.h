/* An MoE layer, and how its work is shared out. */

#include "tiles.h"

typedef struct {
    int64_t bfloat16; /* else float32 */
    int64_t activation, gated; /* which one, and whether there are gates */
    int64_t tokens, top_k, experts, width, inner, parts, threads;
    int64_t first_expert, first_row, down_expert, down_row; /* strides of the weights, in bytes */
    const char *hidden;   /* (tokens, width) */
    const char *first;    /* (experts, 2 inner, width): gates, then ups; or (experts, inner, width) */
    const char *down;     /* (experts, width, inner) */
    const float *scales;  /* (tokens, top_k) */
    const int64_t *index; /* (tokens, top_k); other processes have the experts that are not in 0, ..., experts - 1 */
    int64_t *slots;       /* (tokens * top_k,), work space: which of the index each row belongs to */
    int64_t *places;      /* (tokens * top_k,), work space: the row of each of the index */
    int64_t *starts;      /* (experts + 1,), work space: the first row of each expert */
    float *rows;          /* (parts, tokens * top_k, width), work space: outputs of the experts, or of parts of them */
    char *output;         /* (tokens, width) */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

    /* backward: of what is a null pointer nothing is made */
    int64_t float32_gradients;  /* of weights, which may be float32 where products are bfloat16 */
    int64_t grad_first_expert, grad_first_row, grad_down_expert, grad_down_row; /* strides, in bytes */
    const char *grad_output;    /* (tokens, width) */
    char *grad_first;           /* as first; what belongs to experts without rows is left as it is */
    char *grad_down;            /* as down */
    float *grad_scales;         /* (parts, tokens * top_k), of parts of an expert; of what is elsewhere left as it is */
} Problem;

typedef struct {
    int64_t expert, start, stop, part; /* rows from start to stop; which part of the inner numbers */
} Task;

/* The inner numbers of a task: parts begin at multiples of 32. */
INLINE int64_t begin_of(const Problem *problem, int64_t part) {
    return part == problem->parts ? problem->inner : problem->inner / 32 * part / problem->parts * 32;
}

/* A row's numbers in hidden or grad_output. */
INLINE const char *token_of(const Problem *problem, const char *tokens, int64_t row) {
    return tokens + problem->slots[row] / problem->top_k * problem->width * (problem->bfloat16 ? 2 : 4);
}

/*
 * The tokens of `count` rows in panels of 16, each of whole(bytes) words. Where a panel has no more rows, it has the
 * last one again, to no use.
 */
static void make_panels(const Problem *problem, const char *tokens, int64_t start, int64_t count, char *panels) {
    int64_t bytes = problem->width * (problem->bfloat16 ? 2 : 4);
    for (int64_t done = 0; done < count; done += SIDE, panels += whole(bytes) * SIDE) {
        const char *from[SIDE];
        for (int column = 0; column < SIDE; column++)
            from[column] = token_of(problem, tokens, start + least(done + column, count - 1));
        for (int64_t at = 0; at < bytes; at += 64) {
            Lanes lines[SIDE];
            for (int column = 0; column < SIDE; column++)
                lines[column] = load_some(from[column] + at, bytes - at);
            transpose(lines, panels + at * SIDE, 64, SIDE);
        }
    }
}

/* A tile of what experts put out, transposed to the rows of its tokens; a unit for each tile. */
static void put_outputs(const Rest *rest, int unit) {
    int panel = unit / 2, block = unit % 2;
    Lanes lines[SIDE];
    for (int line = 0; line < SIDE; line++)
        lines[line] = load(rest->out[block][panel] + line * SIDE);
    transpose(lines, rest->to + panel * rest->next + block * SIDE * 4, rest->step, rest->rows - panel * SIDE);
}

/* Rows of (tokens * top_k, width) that a panel's 32 results belong to. */
INLINE void to_rows(Rest *rest, const Problem *problem, Task task, int64_t done, int64_t column) {
    int64_t row = task.part * problem->tokens * problem->top_k + task.start + done, width = problem->width;
    rest->put_away = put_outputs;
    rest->unit = 0;
    rest->units = 2 * rest->panels;
    rest->to = (char *)(problem->rows + row * width + column);
    rest->step = width * 4;
    rest->next = SIDE * width * 4;
    rest->rows = task.stop - task.start - done;
}

static __thread char *space; /* kept from call to call: new memory would be mapped each time */
static __thread int64_t space_bytes;

enum { KEPT = 1 << 24 }; /* bytes, at most */

static void give_space_back(void) {
    free(space);
    space = NULL;
    space_bytes = 0;
}

static int has_space(int64_t bytes) {
    if (space_bytes < bytes) {
        give_space_back();
        space = aligned_alloc(64, whole(bytes));
        space_bytes = space ? bytes : 0;
    }
    return space != NULL;
}
