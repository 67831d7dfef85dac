"""Where the routers of a model send the tokens of a text. Shapes as in routing.py."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mhmoe.errors import UserError

from .routing import MODEL_TYPES, ExpertCounts, RoutingRecorder
from .routing_text import token_rows
from .token_reach import TokenReach


@torch.inference_mode()
def analyse_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    *,
    max_tokens: int = 20_000,
    batch_size: int = 8,
    block_size: int = 512,
    threshold: float = 0.0,
    min_count: int = 10,
    num_extremes: int = 10,
) -> dict:
    """
    Run a text through a model and count which experts its tokens reach. Nothing is kept but sums: memory does not grow
    with the text. Padding does not count, and the figures depend neither on `batch_size` (beyond what rounding does to
    close router scores) nor on the order of the documents.

    ```python
    >>> from mhmoe.evaluation import analyse_routing

    >>> routing = analyse_routing(model, tokenizer, "books.jsonl.zst")
    >>> routing["share_activated"], routing["experts_per_token"], routing["tokens"]["most"][0]["token"]
    ```

    Args:
        model: MH-MoE of any number of heads, or another of `routing.MODEL_TYPES`, with a head or without.
        tokenizer: the model's.
        text: .txt, or .jsonl with the field "text", perhaps with .gz, .zst or .bz2.
        max_tokens: how much of the text is used, from its start.
        batch_size: rows at a time.
        block_size: tokens in a row, which see each other; a document's last row may be shorter.
        threshold: selections per token that an expert must exceed to count as activated; 0 is at least once. See
            [`ExpertCounts.share_above`].
        min_count: occurrences from which a vocabulary item is listed under `tokens`.
        num_extremes: length of those lists.

    Returns:
        In plain Python, ready for JSON, an [`ExpertCounts.summary`] with further entries: `num_moe_heads`,
            `num_experts`, `num_experts_per_tok` (h, E, k of the model); `share_activated`, of each layer and of all:
            experts over `threshold` (P1 figure 1a), which is an entry too; `layers[].frequency`: each expert's
            selections per token (P1 figure 5); `layers[].tokens_by_experts`: the number of tokens that reach
            0, 1, ..., h * k different experts (figure 7); `tokens`: `most` and `fewest`, the vocabulary items that
            reach most and fewest different experts on average over occurrences and layers, each with `id`, `token`
            (decoded), `count` and `experts_per_token`.

    Raises:
        UserError: the model has no routers, the text cannot be read, or the tokenizer is another model's.
    """
    recorder = RoutingRecorder(model, MODEL_TYPES)
    if not recorder.layers:
        raise UserError(f"{model.name_or_path or type(model).__name__}: has no MoE layers, so there is no routing")
    counts = recorder.new_counts()
    reach = TokenReach(model.config.vocab_size)
    rows = token_rows(Path(text), tokenizer, block_size, max_tokens)
    name = Path(model.name_or_path or "").name or type(model).__name__
    with recorder, tqdm(total=max_tokens, desc=name, unit="token", unit_scale=True) as progress:
        for input_ids, mask in _batches(rows, batch_size):
            if input_ids.max() >= model.config.vocab_size:
                raise UserError(
                    f"{name}: its tokenizer gives token {input_ids.max()}, but vocab_size={model.config.vocab_size}; "
                    "it is another model's tokenizer"
                )
            input_ids, mask = input_ids.to(model.device), mask.to(model.device)
            model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            counts.add(recorder.chosen, mask)
            reach.add(recorder.chosen, input_ids, mask)
            progress.update(int(mask.sum()))
    return {
        "num_moe_heads": counts.num_sub_tokens // counts.num_tokens,
        "num_experts": counts.counts.shape[1],
        "num_experts_per_tok": int(counts.counts[0].sum()) // counts.num_sub_tokens,
        "threshold": threshold,
        **_summary(counts, threshold),
        "tokens": _extremes(reach, tokenizer, num_extremes, min_count),
    }


def _batches(rows: Iterable[list[int]], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask, (B, T) both, padded on the right: causal attention never sees it."""
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        input_ids = torch.zeros_like(mask)
        input_ids[mask.bool()] = torch.tensor([token for row in batch for token in row])
        yield input_ids, mask


def _summary(counts: ExpertCounts, threshold: float) -> dict:
    summary = counts.summary()
    activated = counts.share_above(threshold)
    summary["share_activated"] = activated.mean().item()
    most = int(counts.counts[0].sum()) // counts.num_tokens  # h * k
    for row, layer in enumerate(summary["layers"]):
        layer["share_activated"] = activated[row].item()
        layer["frequency"] = counts.frequency[row].tolist()
        layer["tokens_by_experts"] = counts.reach[row, : most + 1].tolist()
    return summary


def _extremes(reach: TokenReach, tokenizer: PreTrainedTokenizerBase, number: int, min_count: int) -> dict:
    means = reach.experts_per_token
    return {
        kind: [
            {
                "id": item,
                "token": tokenizer.decode([item]),
                "count": int(reach.occurrences[item]),
                "experts_per_token": means[item].item(),
            }
            for item in items
        ]
        for kind, items in zip(("most", "fewest"), reach.extremes(number, min_count), strict=True)
    }
