"""Rows times the matrices of their experts, in one thread."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F


LIGHT = 16  # rows of an expert up to which Python's time between the products counts
NARROW = 6  # rows that are sooner multiplied as columns, see `linear`


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """
    (n, a), (b, a) -> (n, b), for few rows in float32. The product of the weight and columns reads it about twice as
    fast as that of rows and the transposed weight, where it is not in the cache (MKL on an AMD EPYC); but a single
    column is again slow.
    """
    columns = rows.repeat(2, 1).t() if len(rows) == 1 else rows.t()
    return torch.mm(weight, columns)[:, : len(rows)].t()


class Products:
    """Sorted rows times the matrix of their expert, of `weights` (E, a, b), in the dtype of the products."""

    def __init__(self, weights: Tensor, dtype: torch.dtype):
        self.weights = weights
        self.converted = None if weights.dtype == dtype else torch.empty_like(weights[0], dtype=dtype)
        self.narrow = NARROW if dtype == torch.float32 and weights.stride(1) == 1 else 0
        # the library's own loop, which has no time for Python between its products but wants rows of whole 16 bytes
        self.can_group = (
            hasattr(F, "grouped_mm")
            and self.converted is None
            and weights.data_ptr() % 16 == 0
            and dtype.itemsize < 8
            and all(size * dtype.itemsize % 16 == 0 for size in weights.shape[1:])
        )

    def __call__(self, rows: Tensor, experts: Sequence[int], loads: Sequence[int], out: Tensor) -> None:
        """(n, a) -> (n, b); of the rows, `loads` belong to each of the `experts`, which ascend."""
        if self.can_group and self._is_light(experts, loads, len(rows)):
            first, last = experts[0], experts[-1]
            ends = [0] * (last - first + 1)
            for expert, load in zip(experts, loads, strict=True):
                ends[expert - first] = load
            ends = torch.tensor(list(accumulate(ends)), dtype=torch.int32)
            out.copy_(F.grouped_mm(rows, self.weights[first : last + 1], offs=ends))
            return
        for expert, left, product in zip(experts, rows.split(loads), out.split(loads), strict=True):
            weight = self.weights[expert]
            if self.converted is not None:
                weight = self.converted.copy_(weight)
            if len(left) <= self.narrow:
                product.copy_(linear(left, weight.t()))
            else:
                torch.mm(left, weight, out=product)

    def _is_light(self, experts: Sequence[int], loads: Sequence[int], rows: int) -> bool:
        """What the library's own loop is for: little to do for each expert, and not too many of them passed over."""
        reach = experts[-1] - experts[0] + 1
        return len(experts) > 1 and self.narrow < rows / len(experts) <= LIGHT and 4 * len(experts) > reach


def product_into(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Fill `gradient` (a, b), of whatever dtype, with the product of `left` (n, a), transposed, and `right` (n, b)."""
    multiply = torch.mul if len(left) == 1 else torch.mm  # of one row in half the time
    if gradient.dtype == left.dtype:
        multiply(left.t(), right, out=gradient)
    else:
        gradient.copy_(multiply(left.t(), right))
