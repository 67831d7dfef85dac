"""Which neurons of a dense FFN to keep, and what their down columns become without the others."""

import torch


ROUNDS = 64  # in which neurons go: the fewer at a time, the better each choice knows the ones before


def keep_best(gram: torch.Tensor, down: torch.Tensor, number: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep `number` neurons and let them do the others' work: those go first whose loss, with all that are left refitted,
    costs least (Optimal Brain Surgeon, on whole neurons).

    Args:
        gram: (ff, ff), the sum of a a^T over tokens with activations a.
        down: (d, ff), the down projection.
        number: how many neurons to keep.
        ridge: penalty on a column's change, in units of its neuron's mean square. With a huge one, those of largest
            RMS(activation) |down column| stay as they are.

    Returns:
        The indices of the kept neurons, the hottest by RMS(activation) |down column| first, (number,), and the down
        projection, (d, ff), in which the columns of the others are zero.
    """
    largest = gram.diagonal().max()
    gram = gram / (largest if largest else 1)  # squares of small numbers would be zero
    relative = gram.diagonal().sqrt().clamp(min=1e-6)  # of neurons that never fire, too
    size = relative * largest.sqrt() if largest else relative
    columns = down.T * size[:, None]  # (ff, d): what neurons of unit activation would have
    heat = columns.norm(dim=1)
    penalised = gram / (relative * relative[:, None])
    penalised.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised))
    del penalised
    kept = torch.ones(len(size), dtype=torch.bool)
    remaining = len(size) - number
    at_a_time = -(-remaining // ROUNDS)
    while remaining:
        loss = (columns.square().sum(dim=1) / inverse.diagonal()).masked_fill(~kept, torch.inf)
        lost = loss.topk(min(at_a_time, remaining), largest=False).indices
        kept[lost] = False
        remaining -= len(lost)
        gain = torch.linalg.solve(inverse[lost][:, lost], inverse[lost]).T  # (ff, lost)
        columns -= gain @ columns[lost]
        inverse -= gain @ inverse[lost]
        inverse[lost, lost] = 1.0
    columns[~kept] = 0
    hottest_first = heat.masked_fill(~kept, -1).argsort(descending=True, stable=True)[:number]
    return hottest_first, (columns / size[:, None]).T.contiguous()
