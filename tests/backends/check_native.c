/* Runs kernel/experts.c (-D NATIVE='"...') with all arrays of exact sizes on the heap, for -fsanitize=address. */

#include NATIVE

static int check(int bfloat16, int gated, int64_t tokens, int64_t top_k, int64_t experts, int64_t width, int64_t inner,
                 int64_t parts) {
    int64_t size = bfloat16 ? 2 : 4, count = tokens * top_k, matrices = gated ? 2 : 1;
    int64_t *index = malloc(count * 8);
    for (int64_t slot = 0; slot < count; slot++)
        index[slot] = slot * slot % (experts + 1);
    Problem problem = {
        .bfloat16 = bfloat16, .activation = gated ? SILU : GELU, .gated = gated, .tokens = tokens, .top_k = top_k, .experts = experts, .width = width, .inner = inner,
        .parts = parts, .threads = 1, .first_expert = matrices * inner * width * size, .first_row = width * size,
        .down_expert = inner * width * size, .down_row = inner * size,
        .hidden = calloc(tokens * width, size), .first = calloc(experts * matrices * inner * width, size),
        .down = calloc(experts * inner * width, size), .scales = calloc(count, 4), .index = index,
        .slots = malloc(count * 8), .places = malloc(count * 8), .starts = malloc((experts + 1) * 8),
        .rows = malloc(parts * count * width * 4), .output = malloc(tokens * width * size),
    };
    int failed = mhmoe_forward(&problem);
    for (int64_t at = 0; at < tokens * width * size; at++)
        failed |= problem.output[at] != 0;
    problem.grad_output = calloc(tokens * width, size);
    problem.grad_first = malloc(experts * matrices * inner * width * size);
    problem.grad_down = malloc(experts * inner * width * size);
    problem.grad_scales = malloc(parts * count * 4);
    problem.grad_first_expert = problem.first_expert, problem.grad_first_row = problem.first_row;
    problem.grad_down_expert = problem.down_expert, problem.grad_down_row = problem.down_row;
    failed |= mhmoe_backward(&problem);
    for (int64_t at = 0; at < tokens * width * size; at++)
        failed |= problem.output[at] != 0;
    free((void *)problem.grad_output), free(problem.grad_first), free(problem.grad_down), free(problem.grad_scales);
    free((void *)problem.hidden), free((void *)problem.first), free((void *)problem.down), free((void *)problem.scales);
    free(index), free(problem.slots), free(problem.places), free(problem.starts), free(problem.rows);
    free(problem.output);
    return failed;
}

int main(void) {
    int failed = 0;
    int kinds = mhmoe_dtypes() & 2 ? 4 : 2;
    for (int kind = 0; kind < kinds; kind++) {
        int bfloat16 = kind / 2, gated = kind % 2;
        failed |= check(bfloat16, gated, 1, 1, 1, 32, 32, 1) | check(bfloat16, gated, 9, 3, 4, 96, 160, 2) |
                  check(bfloat16, gated, 150, 2, 3, 64, 32, 1) | check(bfloat16, gated, 700, 1, 2, 32, 64, 2) |
                  check(bfloat16, gated, 9, 3, 4, 54, 72, 1) | check(bfloat16, gated, 150, 2, 3, 34, 202, 3);
    }
    give_space_back();
    return failed;
}
