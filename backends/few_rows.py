"""
The experts of a few rows, as in decoding: every row is multiplied by its expert where that lies. Sorting by tensors,
chunks and buffers would take longer than such products themselves.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from .gates import ModuleGate, SiluGate


ROWS_16_BIT, ROWS = 2.4, 1.1  # of each expert in use, on average, up to which this is the fastest
SINGLE = 2  # rows of an expert that in 16 bits are sooner multiplied one by one

_visitors: set[int] = set()  # identifiers of threads that have come here


def ids_if_few(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> list[int] | None:
    """The expert of each row, if experts have so few that the products in `dtype` are best made here."""
    most, rows = ROWS_16_BIT if _own_products_possible(dtype) else ROWS, top_k_index.numel()
    if rows > most * num_experts:
        return None
    ids = top_k_index.flatten().tolist()
    return ids if rows <= most * len(set(ids)) else None


def forward(
    hidden_states: Tensor,
    first_proj: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    ids: Sequence[int],
    gate: SiluGate | ModuleGate,
    dtype: torch.dtype,
) -> Tensor:
    """(S, d), (E, 2i or i, d), (E, d, i), (S, k), S * k ids -> (S, d), without gradients, all products in `dtype`."""
    top_k, rows, order = top_k_weights.shape[1], hidden_states.to(dtype), None
    singles, together = list(enumerate(ids)), []
    # some expert may have more rows than SINGLE
    if dtype.itemsize == 2 and len(set(ids)) + SINGLE <= len(ids):
        slots = sorted(range(len(ids)), key=ids.__getitem__)
        order = torch.tensor(slots)
        rows, top_k = rows.index_select(0, order // top_k), 1
        singles, together = _divided([ids[slot] for slot in slots])
    alone = _own_products_possible(dtype)
    first = _products(rows, top_k, first_proj, singles, together, alone)
    inner = first.new_empty(len(ids), down_proj.shape[2])
    gate.forward(first, inner)
    output = _products(inner, 1, down_proj, singles, together, alone)
    if order is not None:
        output = torch.empty_like(output).index_copy_(0, order, output)
    output = output.mul_(top_k_weights.to(dtype).reshape(-1, 1))
    return output.view(*top_k_weights.shape, hidden_states.shape[1]).sum(dim=1)


def _divided(ids: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[slice, int]]]:
    """Of sorted rows, those that are multiplied one by one, and those together; each with their expert."""
    singles, together, start = [], [], 0
    for expert, run in groupby(ids):
        rows = range(start, start := start + len(list(run)))
        if len(rows) > SINGLE:
            together.append((slice(rows.start, rows.stop), expert))
        else:
            singles.extend((row, expert) for row in rows)
    return singles, together


def _products(
    rows: Tensor,
    top_k: int,
    weights: Tensor,
    singles: Sequence[tuple[int, int]],
    together: Sequence[tuple[slice, int]],
    alone: bool,
) -> Tensor:
    """
    Rows (n / k, a), each k times, times matrices of `weights` (E, b, a): (n, b). In more than 16 bits a row is
    multiplied as two columns that both equal it: MKL reads a matrix that is not in the cache twice as fast for two
    columns as for one (AMD EPYC).
    """
    dtype, as_vectors, experts = rows.dtype, rows.dtype.itemsize == 2, len(weights)
    multiply, copies = (torch.mv, ()) if as_vectors else (torch.mm, (2,))
    factors = rows if as_vectors else rows.repeat(1, 2).view(len(rows), 2, rows.shape[1]).transpose(1, 2)
    factors = [factor for factor in factors.unbind(0) for _ in range(top_k)]
    output = torch.empty(len(factors), weights.shape[1], *copies, dtype=dtype)
    products = output.unbind(0)
    matrices = weights if 4 * len(singles) < experts else weights.unbind(0)  # the faster way to as many
    with _own_products(alone):
        for row, expert in singles:
            if expert < experts:
                multiply(matrices[expert].to(dtype), factors[row], out=products[row])
            else:  # another process has it
                products[row].zero_()
    for span, expert in together:
        if expert < experts:
            torch.mm(rows[span], weights[expert].to(dtype).t(), out=output[span])
        else:
            output[span].zero_()
    return output if as_vectors else output[..., 0].contiguous()


def _own_products_possible(dtype: torch.dtype) -> bool:
    """
    Whether products of a matrix and a vector are made by torch itself, in half the time that oneDNN takes in 16 bits.
    The switch is the whole process's, and torch's larger products need oneDNN: so it is not touched where other
    threads come here too.
    """
    _visitors.add(threading.current_thread().ident)
    alone = sum(thread.ident in _visitors for thread in threading.enumerate()) == 1
    return dtype.itemsize == 2 and alone and not torch.backends.flags_frozen()


@contextmanager
def _own_products(possible: bool) -> Iterator[None]:
    one_dnn = torch.backends.mkldnn
    if not (possible and one_dnn.enabled):
        yield
        return
    one_dnn.enabled = False
    try:
        yield
    finally:
        one_dnn.enabled = True
