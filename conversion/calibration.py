"""Calibration text, and its way through a model that is being converted, one decoder layer in memory."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError, one_line
from mhmoe.text import open_text, text_format

from .checkpoint import DenseCheckpoint
from .families import carried_fields


# Gives a tensor of the dense model by the name that strategy `exact` has for it: FFNs are `...mlp.shared_expert...`.
Dense = Callable[[str], torch.Tensor]
WIDTH = 512  # tokens of a row


def read_rows(checkpoint: DenseCheckpoint, file: Path, max_tokens: int) -> torch.Tensor:
    """
    Token ids of a calibration text in equal rows, (B, T).

    Args:
        checkpoint: whose tokenizer is used.
        file: .txt, or .jsonl with a field "text", of each of which a piece from the middle is used; it may be
            compressed.
        max_tokens: how much of it is used.
    """
    if max_tokens < 64:
        raise UserError(f"--calibration-tokens {max_tokens} is too few; give at least 64, better some ten thousand")
    in_lines = text_format(file) == ".jsonl"
    try:
        with open_text(file) as stream:
            content = "".join(_pieces(stream, 8 * max_tokens) if in_lines else stream.read(8 * max_tokens))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as text ({one_line(error)}); give another --calibration") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        ids = tokenizer(content, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids[0]
    except Exception as error:  # tokenizers raise bare Exception for a broken tokenizer.json
        raise UserError(f"{checkpoint.folder}: no tokenizer for --calibration ({one_line(error)})") from error
    width = min(WIDTH, checkpoint.config.max_position_embeddings, len(ids) // 8)
    if width < 8:
        raise UserError(f"{file}: only {len(ids)} tokens; give a longer --calibration")
    return ids[: len(ids) // width * width].view(-1, width)


def _pieces(records: Iterable[str], characters: int) -> Iterator[str]:
    """About a row from the middle of each record, so that a few whole books do not use up all the tokens."""
    for record in records:
        text = json.loads(record)["text"]
        start = max(len(text) // 2 - 2 * WIDTH, 0)
        yield text[start : start + 4 * WIDTH] + "\n"
        characters -= min(len(text), 4 * WIDTH)
        if characters < 0:
            return


class LayerWalk:
    """
    Hidden states of calibration rows, (B, T, d), in a model that is being converted, layer after layer. Its FFNs are
    the caller's part, who adds their outputs to `states`. Called without gradients.

    Besides these states and one dense decoder layer it holds nothing.

    Args:
        config: of the dense model.
        rows: (B, T) token ids.
        dense: gives the dense model's tensors.
    """

    def __init__(self, config: PreTrainedConfig, rows: torch.Tensor, dense: Dense):
        with torch.device("meta"):
            self._skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32).base_model.eval()
        self._load = dense
        embedding = dense("model.embed_tokens.weight")
        self.states = torch.nn.functional.embedding(rows, embedding).float()
        rotary = type(self._skeleton.rotary_emb)(config)
        self._positions = rotary(self.states, torch.arange(rows.shape[1])[None])
        self._layer_types = MHMoEConfig(**carried_fields(config)).layer_types
        self._masks = dict.fromkeys(self._layer_types)  # None: causal
        if "sliding_attention" in self._masks:
            self._masks["sliding_attention"] = create_sliding_window_causal_mask(
                self._skeleton.config,
                self.states[:1],
                None,
                None,  # no padding, no cache
            )

    def enter(self, layer: int) -> torch.nn.Module:
        """Move the states past the attention of `layer`; returns its dense FFN, which is to see `inputs()`."""
        module = self._skeleton.layers[layer]
        prefix = f"model.layers.{layer}."
        names = {name: prefix + name.replace("mlp.", "mlp.shared_expert.", 1) for name in module.state_dict()}
        module.load_state_dict({name: self._load(origin).float() for name, origin in names.items()}, assign=True)
        ffn, self._norm = module.mlp, module.post_attention_layernorm
        module.mlp, module.post_attention_layernorm = _Zero(), torch.nn.Identity()
        mask = self._masks[self._layer_types[layer]]
        for row in range(len(self.states)):
            states = self.states[row : row + 1]
            self.states[row] = module(states, attention_mask=mask, position_embeddings=self._positions)[0]
        self._skeleton.layers[layer] = torch.nn.Identity()
        return ffn

    def inputs(self, rows: Iterable[int] | None = None) -> Iterator[torch.Tensor]:
        """What the FFN sees of each row, or of some, (T, d)."""
        for row in range(len(self.states)) if rows is None else rows:
            yield self._norm(self.states[row])


class DenseWalk(LayerWalk):
    """The walk through the dense model itself."""

    layer = -1

    @torch.no_grad()
    def move_to(self, layer: int) -> None:
        """Move the states to the FFN of `layer`, which is after the last one that was asked for."""
        while self.layer < layer:
            if self.layer >= 0:
                for row, inputs in enumerate(self.inputs()):
                    self.states[row] += self._ffn(inputs)
            self.layer += 1
            self._ffn = self.enter(self.layer)


class _Zero(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(states)
