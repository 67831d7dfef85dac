"""What a model is pre-trained on, row by row, in an order that no model has a say in."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from datasets import Dataset, IterableDataset, are_progress_bars_disabled, concatenate_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mhmoe.errors import UserError

from .data import pack


END_OF_TEXT = "<|endoftext|>"


def data_order(lengths: Sequence[int], total: int, seed: int) -> list[int]:
    """
    Which rows to train on, in order. The texts take turns, so each has an equal share; one with fewer rows than its
    share comes round again, every time in a new random order.

    Args:
        lengths: rows of each text.
        total: rows to train on.
        seed: of the random orders, which depend on nothing else.

    Returns:
        `total` indices into the texts' rows put one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    orders, start = [], 0
    for length in lengths:
        share = -(-total // len(lengths))
        passes = [torch.randperm(length, generator=generator) for _ in range(-(-share // length))]
        orders.append(start + torch.cat(passes)[:share])
        start += length
    return torch.stack(orders, dim=1).flatten()[:total].tolist()


def pack_in_shares(
    texts: list[Dataset],
    validation_texts: list[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    train_rows: int,
    validation_rows: int | None,
    seed: int,
) -> tuple[Dataset, list[Dataset]]:
    """
    Packed rows to train on (see [`data_order`]), and of each text to validate on.

    Args:
        texts: to train on; the first `train_rows` rows of each, shared equally, are the pool that is drawn from.
        validation_texts: to validate on; if empty, the first rows of `texts` are kept for it and not trained on.
        tokenizer: has an end-of-text token.
        block_size: tokens in a row.
        train_rows: rows to train on.
        validation_rows: rows to validate on, shared equally by the texts, and evenly spread over each of
            `validation_texts`; None for all of them.
        seed: of the order.

    Raises:
        UserError: a text does not fill a row, or leaves none to train on.
    """
    held_out = 0 if validation_texts else _share(validation_rows, texts) or 0
    train_share = -(-train_rows // len(texts))
    pools = [pack(text, tokenizer, block_size, held_out + train_share) for text in texts]
    if (fewest := min(map(len, pools))) <= held_out:
        raise UserError(
            f"block_size={block_size}: a text to train on fills only {fewest} blocks, of which {held_out} are for "
            "validation; give more text or a smaller block_size"
        )
    validation = [pool.select(range(held_out)) for pool in pools]
    if validation_texts:
        validation = _pack_spread(validation_texts, tokenizer, block_size, validation_rows)
    pools = [pool.select(range(held_out, len(pool))) for pool in pools]
    order = data_order([len(pool) for pool in pools], train_rows, seed)
    return concatenate_datasets(pools).select(order), validation


def pack_validation(
    texts: Sequence[Dataset | IterableDataset],
    validation_texts: list[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    rows: int | None,
) -> tuple[list[Dataset], int]:
    """
    The same rows to validate on as [`pack_in_shares`] takes, where those to train on are not packed; and how many of
    each of `texts` are among them.

    Raises:
        UserError: a text to validate on does not fill a row.
    """
    if validation_texts:
        return _pack_spread(validation_texts, tokenizer, block_size, rows), 0
    held_out = _share(rows, texts) or 0
    packed = [pack(text, tokenizer, block_size, held_out or 1) for text in texts]
    return [of_text.select(range(min(held_out, len(of_text)))) for of_text in packed], held_out


def train_tokenizer(
    texts: Sequence[Dataset | IterableDataset], vocab_size: int, model_max_length: int, characters: int = 20_000_000
) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of at most `vocab_size` tokens, learnt from the first `characters` of the texts in equal
    shares. `<|endoftext|>` (0) both begins and ends a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=not are_progress_bars_disabled(),
    )
    share = characters // len(texts)
    tokenizer.train_from_iterator((piece for text in texts for piece in _first_characters(text, share)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model_max_length,
    )


def shuffled_pieces(documents: Dataset, characters: int) -> Dataset:
    """
    Documents cut into pieces of at most `characters`, each a document of its own, in a random order that is always the
    same: the first pieces then have something of every document.
    """
    pieces = documents.map(
        _cut, batched=True, batch_size=16, fn_kwargs={"characters": characters}, desc="cutting documents into pieces"
    )
    return pieces.shuffle(seed=0)


def _cut(batch: dict[str, list[str | None]], characters: int) -> dict[str, list[str]]:
    texts = [text for text in batch["text"] if text]
    return {"text": [text[start : start + characters] for text in texts for start in range(0, len(text), characters)]}


def _pack_spread(
    texts: list[Dataset], tokenizer: PreTrainedTokenizerBase, block_size: int, rows: int | None
) -> list[Dataset]:
    """Rows of each text, evenly spread over it; a [`UserError`] if one has none."""
    packed = [_spread(pack(text, tokenizer, block_size), _share(rows, texts)) for text in texts]
    if not all(map(len, packed)):
        raise UserError(f"block_size={block_size}: the validation text does not fill one block; choose a smaller one")
    return packed


def _share(rows: int | None, texts: Sequence) -> int | None:
    """Of each text; `None` for all its rows."""
    return None if rows is None else -(-rows // len(texts))


def _spread(rows: Dataset, number: int | None) -> Dataset:
    if number is None or number >= len(rows):
        return rows
    return rows.select([index * len(rows) // number for index in range(number)])


def _first_characters(documents: Iterable[dict], characters: int) -> Iterator[str]:
    for document in documents:
        text = (document["text"] or "")[:characters]
        yield text
        characters -= len(text)
        if characters <= 0:
            return
