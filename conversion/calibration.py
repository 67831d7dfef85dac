"""Calibration text, and its way through a model that is being converted, one decoder layer in memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import LlamaMLP

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError, one_line
from mhmoe.loading import load_tokenizer, token_ids_of
from mhmoe.text import READ_ERRORS, json_records, open_text, text_format

from .checkpoint import DenseCheckpoint
from .families import carried_fields


T = TypeVar("T")
CALIBRATION_TOKENS = 32768  # of a calibration text, unless the user says otherwise
LEAST_TOKENS = 64  # of each text
LEAST_ROWS = 8  # every eighth is held out
WIDTH = 512  # tokens of a row


def read_rows(
    checkpoint: DenseCheckpoint, files: Sequence[Path], max_tokens: int, trust_remote_code: bool = False
) -> dict[Path, torch.Tensor]:
    """
    Token ids of calibration texts, in rows of equal length T: (B, T) of each file.

    Args:
        checkpoint: whose tokenizer is used.
        files: .txt, or .jsonl with a field "text", of each of which a piece from the middle is used; they may be
            compressed. Each has the same share of the tokens; one that stands here twice has two.
        max_tokens: how many are used, of all files together.
        trust_remote_code: whether the tokenizer's own code may be run.

    Raises:
        UserError: a file cannot be read, or is too short.
    """
    if max_tokens < (least := LEAST_TOKENS * len(files)):
        raise UserError(
            f"--calibration-tokens {max_tokens} is too few; give at least {least}, better some ten thousand"
        )
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    ids = {}
    for file, times in Counter(files).items():
        share = max_tokens * times // len(files)
        content = _read(file, 8 * share)
        ids[file] = token_ids_of(tokenizer, content, return_tensors="pt", truncation=True, max_length=share)[0]
    rows = LEAST_ROWS + len(ids) - 1  # each file but one may leave a row's tokens over
    width = min(WIDTH, checkpoint.config.max_position_embeddings, sum(map(len, ids.values())) // rows)
    for file, own in ids.items():
        if len(own) < max(width, LEAST_TOKENS):
            raise UserError(f"{file}: only {len(own)} tokens; give a longer --calibration")
    return {file: own[: len(own) // width * width].view(-1, width) for file, own in ids.items()}


def _read(file: Path, characters: int) -> str:
    """About so many of a text."""
    in_lines = text_format(file) == ".jsonl"
    try:
        if in_lines:
            return "".join(_pieces(file, characters))
        with open_text(file) as stream:
            return stream.read(characters)
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(f"{file}: cannot be read as text ({one_line(error)}); give another --calibration") from error


def _pieces(file: Path, characters: int) -> Iterator[str]:
    """About a row from the middle of each record, so that a few whole books do not use up all the tokens."""
    for line, record in json_records(file):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f'{file}: line {line} has no field "text" that holds a text; give another --calibration')
        start = max(len(text) // 2 - 2 * WIDTH, 0)
        yield text[start : start + 4 * WIDTH] + "\n"
        characters -= min(len(text), 4 * WIDTH)
        if characters < 0:
            return


class LayerWalk:
    """
    The way of calibration rows through a model that is being converted, layer after layer. Its FFNs are the caller's
    part: for each of `layers()`, the caller looks at `inputs()` and then calls `add`. Used without gradients.

    Besides the hidden states and one dense decoder layer it holds nothing.

    Args:
        config: of the dense model.
        token_ids: (B, T).
        load: gives a tensor of the dense model by its name.

    Attributes:
        states: (B, T, d), the hidden states of all rows, before the FFN of the layer that the walk has come to.
    """

    def __init__(self, config: PreTrainedConfig, token_ids: torch.Tensor, load: Callable[[str], torch.Tensor]):
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32).base_model.eval()
        self._load = load
        embedding = load("model.embed_tokens.weight")
        self.states = torch.nn.functional.embedding(token_ids, embedding).float()
        rotary = type(self._skeleton.rotary_emb)(config)
        self._positions = rotary(self.states, torch.arange(token_ids.shape[1])[None])
        self._layer_types = MHMoEConfig(**carried_fields(config)).layer_types or []
        self._masks = dict.fromkeys(self._layer_types)  # None: causal
        if "sliding_attention" in self._masks:
            self._masks["sliding_attention"] = create_sliding_window_causal_mask(
                self._skeleton.config,
                self.states[:1],
                None,
                None,  # no padding, no cache
            )

    def layers(self) -> Iterator[LlamaMLP]:
        """Move the states past the attention of each layer in turn, and yield its dense FFN, which is as Llama's."""
        for layer, module in enumerate(self._skeleton.layers):
            names = module.state_dict()
            tensors = {name: self._load(f"model.layers.{layer}.{name}").float() for name in names}
            module.load_state_dict(tensors, assign=True)
            del tensors
            ffn, self._norm = module.mlp, module.post_attention_layernorm
            module.mlp, module.post_attention_layernorm = _Zero(), torch.nn.Identity()
            mask = self._masks[self._layer_types[layer]]
            for row in range(len(self.states)):
                states = self.states[row : row + 1]
                self.states[row] = module(states, attention_mask=mask, position_embeddings=self._positions)[0]
            self._skeleton.layers[layer] = module = torch.nn.Identity()
            yield ffn
            del ffn

    def inputs(self, rows: Iterable[int] | None = None) -> Iterator[torch.Tensor]:
        """What the FFN sees of each row, or of some, (T, d)."""
        for row in range(len(self.states)) if rows is None else rows:
            yield self._norm(self.states[row])

    def add(self, ffn: torch.nn.Module) -> None:
        """Add what `ffn`, which maps (1, T, d) to the same shape, answers to all rows."""
        for row, inputs in enumerate(self.inputs()):
            self.states[row] += ffn(inputs[None])[0]


@torch.no_grad()
def dense_walk(
    config: PreTrainedConfig, token_ids: torch.Tensor, load: Callable[[str], torch.Tensor]
) -> Iterator[LayerWalk]:
    """The walk through the dense model itself: it is yielded when it has come to the FFN of each layer."""
    walk = LayerWalk(config, token_ids, load)
    for ffn in walk.layers():
        yield walk
        walk.add(ffn)


class LayerByLayer(Generic[T]):
    """
    The items of an iterator, one for each layer, by their index. The iterator is costly, and so are its items: it runs
    as far as it must, the last item alone is kept, and asking for an earlier one starts the iterator again.
    """

    def __init__(self, start: Callable[[], Iterator[T]]):
        self._start = start
        self._begin()

    def __getitem__(self, layer: int) -> T:
        if layer < self._index:
            self._begin()
        while self._index < layer:
            self._item = None  # which need not outlive the making of the next one
            self._item = next(self._iterator)
            self._index += 1
        assert self._item is not None  # no layer is before the first
        return self._item

    def _begin(self) -> None:
        self._iterator, self._index, self._item = self._start(), -1, None


class _Zero(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(states)
