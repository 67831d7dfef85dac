"""Text for causal language modelling: documents out of a file or a Hub data set, packed into blocks of one length."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    NamedSplit,
    Value,
    config,
    get_dataset_split_names,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from mhmoe.errors import UserError, one_line
from mhmoe.files import writing
from mhmoe.loading import token_ids_of
from mhmoe.text import READ_ERRORS, json_records, open_text, text_format


KINDS = {".txt": "text", ".json": "json", ".jsonl": "json"}
TEXT = Features({"text": Value("large_string")})
DOCUMENTS_IN_MEMORY = 64  # which may be books
PIECE = 1_000_000  # characters of a text file that are read at once where it is streamed


def load_file(path: str, text_column: str = "text") -> Dataset:
    """
    Documents of a file, in its order, as a data set with the one column "text".

    Args:
        path: a .txt file, which is one document, or JSON (Lines) with a document in each row; it may be compressed.
        text_column: the JSON field that holds the text.

    Raises:
        UserError: there is no such file, it is empty, of another format, or broken, or has no such column of text.
    """
    try:
        with _in_cache():
            return Dataset.from_generator(
                _documents,
                features=TEXT,
                gen_kwargs=_settings(path, text_column),
                split=NamedSplit("documents"),  # which the progress bar names
                writer_batch_size=DOCUMENTS_IN_MEMORY,
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def stream_files(paths: Sequence[str], text_column: str = "text") -> IterableDataset:
    """
    The same of several files one after the other, without a copy on disk: each is read while the data set is iterated.
    A long .txt file comes in pieces, cut at line ends, which are documents of their own.

    Raises:
        UserError: as [`load_file`], and of what is in a file only when it is read.
    """
    files = [_settings(path, text_column) for path in paths]
    return IterableDataset.from_generator(_documents_of_files, features=TEXT, gen_kwargs={"files": files})


def load_hub_split(
    name: str, config_name: str | None, split: str, text_column: str = "text", streaming: bool = False
) -> Any:
    """
    Documents of one split of a data set on the Hub (or in a folder), in its order, with the one column "text", as a
    [`Dataset`] or, if it is streamed, an [`IterableDataset`]; None if it has no such split.

    Raises:
        UserError: the data set cannot be had, or has no such column of text.
    """
    try:
        if split not in get_dataset_split_names(name, config_name):
            return None
        documents = load_dataset(name, config_name, split=split, streaming=streaming)
        if streaming and documents.features is None:
            documents = documents._resolve_features()  # of the first rows
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"dataset_name={name}: cannot be loaded ({one_line(error.__cause__ or error)})") from error
    return _text_only(documents, text_column, name)


def pack(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    max_blocks: int | None = None,
) -> Dataset:
    """
    Concatenate all documents, the end-of-text token after each, and cut them into blocks. What is left over at the
    very end, less than one block, is dropped.

    Args:
        documents: texts in the column "text".
        block_size: tokens in a block.
        max_blocks: stop after so many blocks; what comes later is not even tokenised.

    Returns:
        A data set of `input_ids`, `block_size` of them in each row; empty when the documents do not fill one block.
    """
    features = Features({"input_ids": List(Value("int32"), length=block_size)})
    if next(_blocks(documents, tokenizer, block_size, max_blocks=1), None) is None:
        return Dataset.from_dict({"input_ids": []}, features=features)  # which from_generator refuses to make
    settings = {"documents": documents, "tokenizer": tokenizer, "block_size": block_size, "max_blocks": max_blocks}
    with _in_cache():
        return Dataset.from_generator(_blocks, features=features, gen_kwargs=settings, split=NamedSplit("blocks"))


def _in_cache() -> AbstractContextManager[None]:
    """What the block writes, it writes into the cache of `datasets`."""
    return writing(Path(config.HF_DATASETS_CACHE), "mend that, or set HF_DATASETS_CACHE to another folder")


def causal_batch(blocks: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A data collator: blocks of T tokens become `input_ids` and `labels` of (B, T), equal, since the model shifts."""
    input_ids = torch.tensor([block["input_ids"] for block in blocks])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def token_ids_of_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, the end-of-text token at the end."""
    end = tokenizer.eos_token_id
    found = token_ids_of(tokenizer, texts, return_attention_mask=False)
    return [token_ids if token_ids[-1:] == [end] else [*token_ids, end] for token_ids in found]


def _settings(path: str, text_column: str) -> dict[str, Any]:
    """What [`_documents`] needs to know; all of it decides where the documents of a file are kept."""
    file = Path(path)
    kind = KINDS[text_format(file, KINDS)]
    stat = file.stat()
    if stat.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    # with its state, so that another state of the file is read anew
    settings = {"path": path, "file": file.resolve(), "text_column": text_column, "kind": kind}
    return {**settings, "state": f"{stat.st_size} {stat.st_mtime_ns}"}


def _documents_of_files(files: list[dict[str, Any]]) -> Iterator[dict[str, str | None]]:
    for settings in files:
        yield from _documents(**settings, piece=PIECE)


def _documents(
    path: str, file: Path, text_column: str, kind: str, state: str, piece: int | None = None
) -> Iterator[dict[str, str | None]]:
    """What is in a file; of JSON only the text is looked at, whatever the other fields are."""
    try:
        yield from _pieces(file, piece) if kind == "text" else _json_documents(path, file, text_column)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read as {kind} ({one_line(error)})") from error


def _pieces(file: Path, characters: int | None) -> Iterator[dict[str, str | None]]:
    with open_text(file) as stream:
        if characters is None:
            yield {"text": stream.read()}
            return
        while text := stream.read(characters):
            yield {"text": text + stream.readline()}


def _json_documents(path: str, file: Path, text_column: str) -> Iterator[dict[str, str | None]]:
    others, found = {}, False
    for line, record in json_records(file):
        text = record.get(text_column)
        found = found or text_column in record
        if not found:
            others.update(dict.fromkeys(record))
        if not isinstance(text, str | None):
            raise UserError(
                f"{path}: column {text_column!r} (text_column) holds {type(text).__name__} in line {line}, not text"
            )
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:  # JSON can hold half a character
            raise UserError(
                f"{path}: column {text_column!r} (text_column) is no Unicode in line {line} ({one_line(error)})"
            ) from error
        yield {"text": text}
    if not found and not others:
        raise UserError(f"{path}: there is no text in it")
    if not found:
        named = [*list(others)[:20], *([f"{len(others) - 20} more"] if len(others) > 20 else [])]
        raise UserError(f"{path}: has no column {text_column!r} (text_column); its columns are {', '.join(named)}")


def _text_only(documents: Any, column: str, origin: str) -> Any:
    if column not in documents.column_names:
        raise UserError(
            f"{origin}: has no column {column!r} (text_column); its columns are {', '.join(documents.column_names)}"
        )
    if documents.features[column] not in (Value("string"), Value("large_string")):
        raise UserError(f"{origin}: column {column!r} (text_column) holds {documents.features[column]}, not text")
    documents = documents.select_columns(column)
    return documents if column == "text" else documents.rename_column(column, "text")


def _blocks(
    documents: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, block_size: int, max_blocks: int | None
) -> Iterator[dict[str, list[int]]]:
    pending, made = [], 0
    for texts in _batches(documents):
        for token_ids in token_ids_of_documents(tokenizer, texts):
            pending += token_ids
            whole = len(pending) // block_size * block_size
            for start in range(0, whole, block_size):
                yield {"input_ids": pending[start : start + block_size]}
                made += 1
                if made == max_blocks:
                    return
            pending = pending[whole:]


def _batches(documents: Iterable[dict[str, Any]], characters: int = 1_000_000) -> Iterator[list[str]]:
    """Texts to tokenise together: many short ones, a few books. Empty ones are left out."""
    texts, length = [], 0
    for document in documents:
        if document["text"]:
            texts.append(document["text"])
            length += len(document["text"])
        if length >= characters:
            yield texts
            texts, length = [], 0
    if texts:
        yield texts
