"""Rows times the matrices of their experts, in one thread."""

import torch
from torch import Tensor

from .choices import way
from .tuning import NARROW_ROWS


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """
    (n, a), (b, a) -> (n, b), for few rows in float32. The product of the weight and columns reads it about twice as
    fast as that of rows and the transposed weight, where it is not in the cache (MKL on an AMD EPYC); but a single
    column is again slow.
    """
    columns = rows.repeat(2, 1).t() if len(rows) == 1 else rows.t()
    return torch.mm(weight, columns)[:, : len(rows)].t()


def narrow_rows(dtype: torch.dtype) -> int:
    """Rows of an expert up to which `linear` is the faster way."""
    return NARROW_ROWS if way(dtype, NARROW_ROWS / 2) == "narrow" else 0


class Chunk:
    """Successive sorted rows that a thread takes together: an expert's, some of them, or those of several experts."""

    def __init__(self, start: int, experts: list[int], loads: list[int]):
        self.experts, self.loads, self.size = experts, loads, sum(loads)
        self.rows = slice(start, start + self.size)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.loads)


class Products:
    """
    Sorted rows times the matrix of their expert, of `weights` (E, a, b), in the dtype of the products; up to `narrow`
    rows of an expert as columns.
    """

    def __init__(self, weights: Tensor, dtype: torch.dtype, narrow: int):
        self.weights = weights
        self.converted = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)
        self.narrow = narrow if weights.stride(1) == 1 else 0

    def __call__(self, rows: Tensor, chunk: Chunk, out: Tensor) -> None:
        """(n, a) -> (n, b), for the rows of a chunk."""
        for expert, load, left, product in zip(
            chunk.experts, chunk.loads, chunk.split(rows), chunk.split(out), strict=True
        ):
            weight = self.weights[expert]
            if self.converted is not None:
                weight = self.converted.copy_(weight)
            if load <= self.narrow:
                product.copy_(linear(left, weight.t()))
            else:
                torch.mm(left, weight, out=product)


def product_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Fill `gradient` (a, b), of whatever dtype, with the product of `left` (n, a), transposed, and `right` (n, b)."""
    multiply = torch.mul if left.shape[0] == 1 else torch.mm  # of one row in half the time
    if gradient.dtype == left.dtype:
        multiply(left.t(), right, out=gradient)
    else:
        gradient.copy_(multiply(left.t(), right))
