"""
The numbers by which the CPU backend chooses between two ways to the same result. Each was chosen on two cores of an
AMD EPYC (torch 2.13.0), by the points of `benchmarks/experts.py` that are named beside it, whose figures are in
`benchmarks/results/experts.json`.

What the tricks of this folder earn: the time of a layer without one, over that with it (`benchmarks/tricks.py`, two
cores of an Intel Xeon with AMX; `benchmarks/results/intel_amx/tricks.json`). What earned less than 5% was removed.

- experts in C (native.py): 1.3 for one token, 1.4 for 16, 1.2 for 512; in bfloat16 1.9, 2.2, 1.7; with backward 1.5.

Where experts are not computed in C:

- measured ways (choices.py): 1.4 for one token, 2.4 for 16, in bfloat16 1.0 for one and 1.5 for 512;
- larger batches with AMX (TILES): 1.1 for 512 tokens in bfloat16;
- a thread for each expert (workers.py): 1.02 forward, 1.05 with backward;
- memory kept (memory.py): 1.4 with backward. Two calls of mallopt earn as much on this processor, and 8% less on an
  AMD EPYC; but they hold for the whole process, which then gives no memory back.
"""

# Rows, on average of each expert in use, up to which rows are multiplied one by one: in bfloat16 where vectors are the
# fastest way to two rows, in bfloat16 where they are not (Intel Xeon), in any other dtype. `--tokens 1 16`, forward.
FEW_ROWS_BF16, FEW_ROWS_BF16_TOGETHER, FEW_ROWS = 2.4, 1.5, 1.15
# Bytes of an expert's first matrix that stay in a cache from one row to the next. `--sizes head3 1b 7b --tokens 1`.
CACHED_BYTES = 1 << 22
# Rows of one expert that in 16 bits are multiplied one by one, others together. `--tokens 16 --dtypes bf16`.
SINGLE_ROWS = 2
# The same averages under torch.compile, over all experts. `--parts compiled --tokens 1 16`.
COMPILED_ROWS_16_BIT, COMPILED_ROWS = 3.2, 1.7
# Numbers in an expert's first matrix, and multiply-adds of its product with the rows, and for reading it, up to
# which all experts go at once; those in 16 bits, too. `--sizes small --tokens 128 1024 4096`.
SMALL_MATRIX, SMALL, SMALL_16_BIT = 1 << 16, 1 << 21, 3 << 21
# Rows that pass through their experts together: enough for the products, not too many for a core's cache.
# `--tokens 512 2048 16384`.
CHUNK_ROWS = 256
# Rows of an expert in float32 that are multiplied as columns. `--tokens 16 --dtypes fp32`.
NARROW_ROWS = 6
# Multiples that 16-bit rows are filled up to, since oneDNN makes a program for every new shape. `--dtypes bf16`.
STEP_ROWS = 8
# Numbers of the first product of experts that are multiplied in one call: what stays in a core's cache. And the
# multiply-adds that take as long as the calls for such a batch. `--sizes head3 small --tokens 256 512 2048`.
BATCH_NUMBERS, CALL = 1 << 20, 1 << 23
# Multiply-adds that torch's operators share out among their threads as fast as one thread for each expert does.
# `--sizes head3 --tokens 16 512 --threads 2`.
QUICK_MULTIPLY_ADDS = 1 << 28
# How many times as many multiply-adds AMX makes in the same time. `--tokens 16 512 2048 --dtypes bf16`, Intel Xeon.
TILES = 8
# Rows that take as long to multiply as their matrix takes to read.
READ_ROWS = 16
# Bytes from which on memory of gradients is kept, and bytes of unused memory that the system is not told of.
# `--tokens 512 2048`, with backward.
LARGE_BYTES, WARM_BYTES = 1 << 22, 1 << 28
# Rows of each expert at which the ways of `choices.py` are timed, how many experts then, and their size (d, i), with C
# another one, of small experts; the seconds for each of these points; how many times as fast as the default another
# way must be to be taken.
LOADS = 1, 2, 32, 128
MEASURED_EXPERTS = 64, 64, 32, 8
MEASURED_SIZES = (256, 512), (64, 128)
MEASURED_SECONDS = 0.05
BETTER = 1.1
