"""
The experts of a few rows, as in decoding: every row is multiplied by its expert where that lies. Sorting by tensors,
chunks and buffers would take longer than such products themselves.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .gates import ModuleGate, SiluGate


ROWS_16_BIT, ROWS = 2, 1.1  # of each expert in use, on average, up to which row by row is the fastest

_visitors: set[int] = set()  # identifiers of threads that have come here


def ids_if_few(top_k_index: Tensor, num_experts: int, dtype: torch.dtype) -> list[int] | None:
    """The expert of each row, if experts have so few that the products in `dtype` are best made row by row."""
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
    top_k = top_k_weights.shape[1]
    with _own_products(dtype):
        factors = [factor for factor in _factors(hidden_states.to(dtype)) for _ in range(top_k)]
        first = _products(factors, first_proj, ids, dtype)
        inner = first.new_empty(len(ids), down_proj.shape[2])
        gate.forward(first, inner)
        output = _products(_factors(inner), down_proj, ids, dtype)
    output = output.mul_(top_k_weights.to(dtype).reshape(-1, 1))
    return output.view(*top_k_weights.shape, hidden_states.shape[1]).sum(dim=1)


def _factors(rows: Tensor) -> Sequence[Tensor]:
    """
    What a matrix is multiplied by for each of the rows (n, a): itself, or in more than 16 bits two columns (a, 2) that
    both equal it. MKL reads a matrix that is not in the cache twice as fast for two columns as for one (AMD EPYC).
    """
    if rows.dtype.itemsize == 2:
        return rows.unbind(0)
    return rows.repeat(1, 2).view(len(rows), 2, rows.shape[1]).transpose(1, 2).unbind(0)


def _products(factors: Sequence[Tensor], weights: Tensor, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The factors of rows times the rows' matrices, of `weights` (E, b, a): (n, b)."""
    as_vectors = dtype.itemsize == 2
    multiply = torch.mv if as_vectors else torch.mm
    output = torch.empty(len(ids), weights.shape[1], *(() if as_vectors else (2,)), dtype=dtype)
    for factor, expert, product in zip(factors, ids, output.unbind(0), strict=True):
        if expert < len(weights):
            multiply(weights[expert].to(dtype), factor, out=product)
        else:  # another process has it
            product.zero_()
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
def _own_products(dtype: torch.dtype) -> Iterator[None]:
    one_dnn = torch.backends.mkldnn
    if not (one_dnn.enabled and _own_products_possible(dtype)):
        yield
        return
    one_dnn.enabled = False
    try:
        yield
    finally:
        one_dnn.enabled = True
