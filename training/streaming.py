"""
Text that is packed while it is trained on: nothing is copied to disk first, and a window of the text is in memory.

One process reads the text in one order, whatever the number of processes and of `dataloader_num_workers`; accelerate
hands each process its rows of a batch. So a run goes on where it was saved, on any number of either.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from mhmoe.errors import UserError, one_line
from mhmoe.intake import read_json

from .arguments import BUFFER_SIZE, TextReading
from .checkpoints import LARGEST_STATE
from .data import token_ids_of_documents
from .sharding import read_distributed_config


CHARACTERS = 1_000_000  # that are tokenised together
STATE = "TextStream"  # among TrainerState's `stateful_callbacks`

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """
    Where a window of shuffled rows begins in a text, and how many of its rows were taken.

    Attributes:
        passes: times that the whole text was read before.
        windows: those before it in this pass.
        documents: the state of the data set where it begins, None for the start of the text.
        tokens: of the documents from there on, that belong to rows before it.
        rows: taken out of the window.
    """

    passes: int = 0
    windows: int = 0
    documents: dict | None = None
    tokens: int = 0
    rows: int = 0


class _Text:
    """Rows of one text, without end."""

    def __init__(self, documents: IterableDataset, stream: "TextStream"):
        self.documents, self.stream = documents, stream
        self.held_out = stream.held_out * stream.block_size  # tokens
        self.start = Position(tokens=self.held_out)
        self._windows_begun: deque[tuple[int, Position]] = deque()  # and the row that each begins with

    def rows(self) -> Iterator[np.ndarray]:
        """From `start` on, each of `block_size` tokens."""
        number, at = 0, self.start
        self._windows_begun = deque([(-at.rows, at)])
        while True:
            has_rows = at.windows > 0 or at.rows > 0
            for begun, window in self.windows(at, self.stream.buffer_size):
                at = begun
                self._windows_begun.append((number - at.rows, at))
                order = np.random.default_rng([self.stream.seed, at.passes, at.windows]).permutation(len(window))
                for index in order[at.rows :]:
                    yield window[index]
                    number += 1
                has_rows = True
            if not has_rows:
                raise self.fills_no_row()
            at = Position(passes=at.passes + 1, tokens=self.held_out)

    def position(self, taken: int) -> Position:
        """After so many rows since `start`; rows before them are forgotten."""
        while len(self._windows_begun) > 1 and self._windows_begun[1][0] <= taken:
            self._windows_begun.popleft()
        first, at = self._windows_begun[0] if self._windows_begun else (-self.start.rows, self.start)
        return replace(at, rows=taken - first)

    def fills_no_row(self) -> UserError:
        beside = " beside those for validation" if self.held_out else ""
        return UserError(
            f"block_size={self.stream.block_size}: the text to train on does not fill one block{beside}; choose a "
            "smaller one, or give more text"
        )

    def windows(self, at: Position, most: int) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Of one pass from `at` on: rows, at most so many together, and where they begin."""
        size = self.stream.block_size
        pending, skip = np.empty(0, np.int32), at.tokens
        chunks: deque[tuple[dict | None, int]] = deque()  # the first is the one in which `pending` begins
        begun, window = at, []
        offset = 0  # of `pending` in its first chunk
        for state, tokens in self._tokenised(at.documents):
            chunks.append((state, len(tokens)))
            pending = np.concatenate([pending, tokens])
            start = min(skip, len(pending))
            skip, offset = skip - start, offset + start
            while True:
                while chunks and offset >= chunks[0][1]:
                    offset -= chunks.popleft()[1]
                if skip or len(pending) - start < size:
                    break
                if not window:
                    begun = replace(begun, documents=chunks[0][0], tokens=offset)
                window.append(pending[start : start + size])
                start, offset = start + size, offset + size
                if len(window) == most:
                    yield begun, window
                    begun, window = replace(begun, windows=begun.windows + 1, rows=0), []
            pending = pending[start:]
        if window:
            yield begun, window

    def _tokenised(self, state: dict | None) -> Iterator[tuple[dict | None, np.ndarray]]:
        """The text from `state` on in chunks, each with the state before it; threads go ahead of the training."""
        chunks = self._chunks(state)
        if not self.stream.workers:
            yield from ((before, self._tokens(texts)) for before, texts in chunks)
            return
        for before, texts in chunks:  # the first in this thread: it sets what the tokenizer keeps of its arguments
            yield before, self._tokens(texts)
            break
        with ThreadPoolExecutor(self.stream.workers) as pool:
            ahead: deque[tuple[dict | None, Any]] = deque()
            for before, texts in chunks:
                ahead.append((before, pool.submit(self._tokens, texts)))
                if len(ahead) > self.stream.workers:
                    before, tokens = ahead.popleft()
                    yield before, tokens.result()
            for before, tokens in ahead:
                yield before, tokens.result()

    def _chunks(self, state: dict | None) -> Generator[tuple[dict | None, list[str]]]:
        self.documents.load_state_dict(state)  # ty: ignore[invalid-argument-type]: None is its start
        texts, length = [], 0
        for document in self.documents:
            if document["text"]:
                texts.append(document["text"])
                length += len(document["text"])
            if length >= CHARACTERS:
                yield state, texts
                state, texts, length = self.documents.state_dict(), [], 0
        if texts:
            yield state, texts

    def _tokens(self, texts: list[str]) -> np.ndarray:
        found = token_ids_of_documents(self.stream.tokenizer, texts)
        return np.concatenate([np.array(token_ids, np.int32) for token_ids in found])


class TextStream(torch.utils.data.IterableDataset):
    """
    Rows of `input_ids` from texts that take turns, without end: a text that ends begins again. A pass over a text has
    the rows that [`pack`] makes of it, in windows of `buffer_size` that are shuffled each for itself.

    `datasets` has a shuffle buffer too, but loses what is in it when it is resumed.

    Args:
        texts: data sets with the column "text".
        tokenizer: has an end-of-text token.
        block_size: tokens of a row.
        buffer_size: rows that are in memory to be shuffled; 1 keeps the order.
        seed: of the order, which depends on nothing else.
        held_out: rows at the beginning of each text that are left out.
        workers: threads that tokenise ahead.

    Raises:
        UserError: when it is read, if a text fills no row or cannot be read.
    """

    def __init__(
        self,
        texts: list[IterableDataset],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        buffer_size: int = BUFFER_SIZE,
        seed: int = 0,
        held_out: int = 0,
        workers: int = 0,
    ):
        self.tokenizer, self.block_size, self.buffer_size = tokenizer, block_size, buffer_size
        self.seed, self.held_out, self.workers = seed, held_out, workers
        self.texts = [_Text(documents, self) for documents in texts]
        self._first = self._taken = 0

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rows = [text.rows() for text in self.texts]
        turn = self._first
        while True:
            yield {"input_ids": next(rows[turn % len(rows)]).tolist()}
            turn += 1

    def check(self) -> None:
        """Read as much of each text as its first row needs; a [`UserError`] if there is none."""
        for text in self.texts:
            if next(text.windows(replace(text.start, rows=0), most=1), None) is None:
                raise text.fills_no_row()

    @property
    def rows(self) -> int:
        """That were taken, also before `load_state_dict`."""
        return self._first + self._taken

    def take(self, rows: int) -> None:
        """Say that of what was read since the start, or since `load_state_dict`, so many rows were trained on."""
        self._taken = rows

    def state_dict(self) -> dict[str, Any]:
        """What [`load_state_dict`] needs to go on after the rows that were taken, though more were read; JSON."""
        number, positions = len(self.texts), []
        for index, text in enumerate(self.texts):
            before_its_turn = (index - self._first) % number
            positions.append(asdict(text.position((self._taken - before_its_turn + number - 1) // number)))
        return {**self._settings(), "rows": self.rows, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: it is the state of a stream with other settings.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise UserError(f"{name}={value}: the run to be resumed has {name}={state[name]}; give the same")
        self._first, self._taken = state["rows"], 0
        for text, position in zip(self.texts, state["positions"], strict=True):
            text.start = Position(**position)

    def _settings(self) -> dict[str, int]:
        return {
            "texts": len(self.texts),
            "block_size": self.block_size,
            "shuffle_buffer_size": self.buffer_size,
            "seed": self.seed,
            "held_out": self.held_out,
        }


def stream_of(
    texts: list[IterableDataset],
    text: TextReading,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    held_out: int = 0,
) -> TextStream:
    """The rows of `texts` as `mhmoe train` and `mhmoe pretrain` stream them; a [`UserError`] if one has none."""
    stream = TextStream(
        texts,
        tokenizer,
        block_size,
        buffer_size=text.shuffle_buffer_size or BUFFER_SIZE,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        held_out=held_out,
        workers=training_args.dataloader_num_workers,
    )
    # the stream has its own: those of the loader would each read the whole text
    training_args.dataloader_num_workers, training_args.dataloader_prefetch_factor = 0, None
    training_args.dataloader_persistent_workers = False
    layout = getattr(text, "distributed_config", None)
    if layout is not None and (read_distributed_config(layout).tp_size or 1) > 1:
        # accelerate does not hand out the rows where some processes share them: each reads the text
        training_args.accelerator_config.dispatch_batches = False  # ty: ignore[invalid-assignment]: it is no dict now
    stream.check()
    return stream


def resume_stream(stream: TextStream | None, checkpoint: str, training_args: TrainingArguments) -> None:
    """
    Let a run go on from `checkpoint` with the text where it stopped.

    Raises:
        UserError: that was another kind of run, or one with other settings; or what it says of the text is broken.
    """
    file = Path(checkpoint, TRAINER_STATE_NAME)
    callbacks = read_json(file, most_bytes=LARGEST_STATE).get("stateful_callbacks")
    kept: Any = callbacks.get(STATE) if isinstance(callbacks, dict) else None
    if (kept is None) != (stream is None):
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: was saved {'with' if kept else 'without'} --streaming; resume it so"
        )
    if stream is not None:
        try:
            stream.load_state_dict(kept["attributes"])
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: does not say where the text goes on ({type(error).__name__}: {one_line(error)}); resume "
                "another checkpoint"
            ) from error
        if training_args.process_index == 0:
            logger.warning("%s: %s blocks were trained on; the text is skipped up to there", checkpoint, stream.rows)
        training_args.ignore_data_skip = True  # it would read again what was trained on


class StreamCallback(TrainerCallback):
    """
    Keeps the state of a [`TextStream`] in Trainer's, and goes on from there.

    Args:
        stream: that `trainer` trains on.
        checkpoint: that it resumes.
    """

    def __init__(self, stream: TextStream, trainer: Trainer, checkpoint: str | None):
        self.stream, self.trainer, self.checkpoint = stream, trainer, checkpoint
        self._step_before = 0

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        self._step_before = state.global_step

    def on_step_begin(self, args, state: TrainerState, control, **kwargs):
        if self.checkpoint is not None and state.global_step == self._step_before:
            # again, as Trainer does after it has skipped rows: to begin an epoch takes a random number
            self.trainer._load_rng_state(self.checkpoint)

    def on_step_end(self, args, state: TrainerState, control, **kwargs):
        state.epoch = state.global_step / state.max_steps  # Trainer counts from where it resumed
        self.stream.take((state.global_step - self._step_before) * self.trainer.get_total_train_batch_size(args))
        position = self.stream.state_dict()
        if state.is_world_process_zero:  # which reads the text
            kept: Any = state.stateful_callbacks  # by name, whatever the library's own type says
            kept[STATE] = {"args": {}, "attributes": position}
