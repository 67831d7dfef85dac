/*
 * The experts of an MoE layer. native.py compiles this file, and calls the functions at its end.
 *
 * Libraries bring the many weights of a product into the order in which they multiply. Here the few tokens are brought
 * into order, and each weight is read once, where it is (tiles.h). Each thread takes an expert, or a part of one, through
 * all its products (forward.h, backward.h).
 */

#include <stddef.h>

#include "backward.h"

typedef struct {
    const Problem *problem;
    int (*perform)(const Problem *problem, Task task);
    const Task *tasks;
    int64_t count, next, failed;
} Work;

static void run_tasks(void *argument) {
    Work *work = argument;
    int64_t next;
#if defined(AMX)
    char before[64] __attribute__((aligned(64)));
    if (work->problem->bfloat16)
        begin_tiles(before);
#endif
    while ((next = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        if (!work->perform(work->problem, work->tasks[next]))
            work->failed = 1;
    if (space_bytes > KEPT)
        give_space_back();
#if defined(AMX)
    if (work->problem->bfloat16)
        end_tiles(before);
#endif
}

enum { SUMMED = 16 }; /* tokens whose outputs a task adds up */

/* The sums of each token's rows, with their weights unless what is summed has them already. */
static void sum_tokens(void *argument) {
    Work *work = argument;
    const Problem *problem = work->problem;
    int64_t width = problem->width, top_k = problem->top_k, part_size = problem->tokens * top_k * width, task;
    while ((task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->count)
        for (int64_t token = task * SUMMED; token < least((task + 1) * SUMMED, problem->tokens); token++)
            for (int64_t next = 0; next < width; next += SIDE) {
                int64_t at = least(next, width - SIDE);
                Lanes total = {0};
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; slot++) {
                    if (problem->places[slot] < 0)
                        continue;
                    const float *row = problem->rows + problem->places[slot] * width + at;
                    Lanes parts = load(row);
                    for (int64_t part = 1; part < problem->parts; part++)
                        parts += load(row + part * part_size);
                    total += parts * (problem->grad_output ? 1 : problem->scales[slot]);
                }
                store_as(problem->bfloat16, problem->output + (token * width + at) * (problem->bfloat16 ? 2 : 4), total);
            }
}

static void share(void (*region)(void *), Work *work) {
    int64_t threads = least(work->problem->threads, work->count);
    if (threads > 1)
        work->problem->parallel(region, work, (unsigned)threads, 0);
    else
        region(work);
}

/* Sort the rows by expert, perform a task for each part of `most` rows of an expert, and add up. */
static int run(const Problem *problem, int (*perform)(const Problem *problem, Task task), int64_t most) {
    int64_t experts = problem->experts, count = problem->tokens * problem->top_k, tasks = 0, *starts = problem->starts;
    memset(starts, 0, (experts + 1) * sizeof *starts);
    for (int64_t slot = 0; slot < count; slot++)
        if ((uint64_t)problem->index[slot] < (uint64_t)experts)
            starts[problem->index[slot] + 1]++;
    for (int64_t expert = 0; expert < experts; expert++) {
        tasks += (starts[expert + 1] + most - 1) / most * problem->parts;
        starts[expert + 1] += starts[expert];
    }
    Task *list = malloc((tasks + 1) * sizeof *list);
    if (!list)
        return 1;
    Work work = {.problem = problem, .perform = perform, .tasks = list};
    for (int64_t expert = 0; expert < experts; expert++)
        for (int64_t start = starts[expert]; start < starts[expert + 1]; start += most)
            for (int64_t part = 0; part < problem->parts; part++)
                list[work.count++] = (Task){expert, start, least(start + most, starts[expert + 1]), part};
    for (int64_t slot = 0; slot < count; slot++) {
        int64_t expert = problem->index[slot];
        problem->places[slot] = (uint64_t)expert < (uint64_t)experts ? starts[expert]++ : -1;
        if (problem->places[slot] >= 0)
            problem->slots[problem->places[slot]] = slot;
    }
    share(run_tasks, &work);
    free(list);
    if (work.failed)
        return 1;
    work.next = 0;
    work.count = problem->output ? (problem->tokens + SUMMED - 1) / SUMMED : 0;
    share(sum_tokens, &work);
    return 0;
}

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
int mhmoe_forward(const Problem *problem) {
    return run(problem, multiply, MOST);
}

/* Fill problem->output with the gradient of the tokens, and the others that are asked for. */
int mhmoe_backward(const Problem *problem) {
    return run(problem, differentiate, INT64_MAX / 2);
}
