"""
The experts of a few rows, as in decoding: every row is multiplied by its expert where that lies; in 16 bits, several
rows of an expert together. Sorting by tensors, chunks and buffers would take longer than such products themselves.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby

import torch
from torch import Tensor

from ..problem import Problem
from .choices import WITHOUT_ONE_DNN, way
from .tuning import CACHED_BYTES, FEW_ROWS, FEW_ROWS_BF16, FEW_ROWS_BF16_TOGETHER, SINGLE_ROWS


_visitors: set[int] = set()  # identifiers of threads that have come here


def ids_if_few(problem: Problem) -> list[int] | None:
    """The expert of each row, if experts have so few that the products are best made here."""
    _visitors.add(threading.get_ident())
    top_k_index, num_experts, dtype = problem.top_k_index, problem.num_experts, problem.dtype
    # a matrix that two rows share is read once where they go together, and twice here if no cache holds it
    most = FEW_ROWS if problem.first_proj[0].nbytes <= CACHED_BYTES else 1
    if dtype == torch.bfloat16 and (way(dtype, 1) != WITHOUT_ONE_DNN or _switch_possible()):
        most = FEW_ROWS_BF16 if way(dtype, FEW_ROWS_BF16) == "vectors" else FEW_ROWS_BF16_TOGETHER
    rows = top_k_index.numel()
    if rows > most * num_experts:
        return None
    ids = top_k_index.flatten().tolist()
    return ids if rows <= most * len(set(ids)) else None


def forward(problem: Problem, ids: Sequence[int]) -> Tensor:
    """The output (S, d) without gradients, in the dtype of the products; `ids` are those of `top_k_index`, S * k."""
    dtype, top_k = problem.dtype, problem.top_k_index.shape[1]
    rows, first_proj, down_proj = problem.hidden_states.to(dtype), problem.first_proj, problem.down_proj
    times = _Products(ids, dtype)
    if times.order is None:
        first = times(rows, first_proj, repeats=top_k)
    else:
        first = times(rows.index_select(0, times.order // top_k), first_proj)
    inner = first.new_empty(len(ids), down_proj.shape[2])
    problem.activation.forward(first, inner)
    output = times(inner, down_proj)
    if times.order is not None:
        output = torch.empty_like(output).index_copy_(0, times.order, output)
    output = output.mul_(problem.top_k_weights.to(dtype).reshape(-1, 1))
    return output.view(*problem.top_k_index.shape, rows.shape[1]).sum(dim=1)


class _Products:
    """
    Rows times the matrices of their experts.

    Attributes:
        order: that the rows must be in, `(n,)`; None for the one that they come in.
        singles: rows, in that order, that are multiplied one by one, and the expert of each.
        together: rows that are multiplied together, and their expert.
    """

    def __init__(self, ids: Sequence[int], dtype: torch.dtype):
        self.without_one_dnn = way(dtype, 1) == WITHOUT_ONE_DNN and _switch_possible()
        self.order, self.singles, self.together = None, list(enumerate(ids)), []
        if dtype.itemsize == 2 and len(set(ids)) + SINGLE_ROWS <= len(ids):  # an expert may have more rows than these
            self._sort(ids)

    def _sort(self, ids: Sequence[int]) -> None:
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.order, self.singles, start = torch.tensor(order), [], 0
        for expert, run in groupby(ids[row] for row in order):
            stop = start + sum(1 for _ in run)
            if stop - start > SINGLE_ROWS:
                self.together.append((slice(start, stop), expert))
            else:
                self.singles += [(row, expert) for row in range(start, stop)]
            start = stop

    def __call__(self, rows: Tensor, weights: Tensor, repeats: int = 1) -> Tensor:
        """
        (n / repeats, a), (E, b, a) -> (n, b), each row taken `repeats` times. A row may be multiplied as two columns
        that both equal it: MKL reads a matrix that is not in the cache twice as fast for two columns as for one on an
        AMD EPYC, but half as fast on an Intel Xeon.
        """
        dtype, how, experts = rows.dtype, way(rows.dtype, 1), len(weights)
        multiply: Callable = torch.mv if how in ("vectors", WITHOUT_ONE_DNN) else torch.mm
        factors, sizes = rows, (weights.shape[1],)
        if how == "two columns":
            factors, sizes = rows.repeat(1, 2).view(len(rows), 2, rows.shape[1]).transpose(1, 2), (*sizes, 2)
        elif how == "one row":
            multiply, factors, sizes = _row_times, rows[:, None], (1, *sizes)
        factors = [factor for factor in factors.unbind(0) for _ in range(repeats)]
        output = torch.empty(len(factors), *sizes, dtype=dtype)
        products = output.unbind(0)
        matrices = weights if 4 * len(factors) < experts else weights.unbind(0)  # the faster way to as many
        convert = weights.dtype != dtype
        with _one_dnn_off() if self.without_one_dnn else nullcontext():
            for row, expert in self.singles:
                if expert < experts:
                    matrix = matrices[expert].to(dtype) if convert else matrices[expert]
                    multiply(matrix, factors[row], out=products[row])
                else:  # another process has it
                    products[row].zero_()
        output = output[..., 0].contiguous() if how == "two columns" else output.view(len(factors), -1)
        for span, expert in self.together:
            if expert < experts:
                torch.mm(rows[span], matrices[expert].to(dtype).t(), out=output[span])
            else:
                output[span].zero_()
        return output


def _row_times(matrix: Tensor, row: Tensor, out: Tensor) -> None:
    torch.mm(row, matrix.t(), out=out)


def _switch_possible() -> bool:
    """
    Whether oneDNN can be switched off for products of a matrix and a vector. The switch is the whole process's, and
    torch's larger products need oneDNN: so it is not touched where other threads come here too.
    """
    alone = sum(thread.ident in _visitors for thread in threading.enumerate()) == 1
    return alone and bool(torch.backends.mkldnn.enabled) and not torch.backends.flags_frozen()


@contextmanager
def _one_dnn_off() -> Generator[None]:
    one_dnn = torch.backends.mkldnn
    one_dnn.enabled = False  # ty: ignore[invalid-assignment]: torch's stub has the property, not its value
    try:
        yield
    finally:
        one_dnn.enabled = True  # ty: ignore[invalid-assignment]
