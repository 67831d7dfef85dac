"""
Strategy `exact`: the dense FFN stays, as the always-on shared expert, and the merge layer starts at zero. The routed
path then adds an exact 0 to every token: the logits keep every bit, and the first training step moves the merge layer.
"""

import re

import torch

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError

from .strategy import ConversionStrategy, Dense


# Dense name -> MH-MoE name, in templates where {n} is the layer. None: knowingly dropped.
WEIGHT_MAP = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{n}.input_layernorm.weight": "model.layers.{n}.input_layernorm.weight",
    "model.layers.{n}.post_attention_layernorm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    **{
        f"model.layers.{{n}}.self_attn.{name}_proj.{kind}": f"model.layers.{{n}}.self_attn.{name}_proj.{kind}"
        for name in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    },
    "model.layers.{n}.self_attn.q_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
    "model.layers.{n}.self_attn.k_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
    **{
        f"model.layers.{{n}}.mlp.{name}_proj.{kind}": f"model.layers.{{n}}.mlp.shared_expert.{name}_proj.{kind}"
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
    # a buffer that old versions of transformers saved; it is computed from the config
    "model.layers.{n}.self_attn.rotary_emb.inv_freq": None,
}


def target_name(dense_name: str) -> str | None:
    """
    The MH-MoE name of a dense tensor, `None` for one that is knowingly dropped.

    Raises:
        KeyError: MH-MoE has no place for it.
    """
    layer = re.search(r"\.layers\.(\d+)\.", dense_name)
    if layer is None:
        return WEIGHT_MAP[dense_name]
    target = WEIGHT_MAP[dense_name.replace(layer[0], ".layers.{n}.", 1)]
    return target and target.replace("{n}", layer[1])


class Exact(ConversionStrategy):
    """The dense FFN as shared expert, the merge layer at zero, the rest random: see the head of this file."""

    name = "exact"

    def shared_width(self, asked: int | None) -> int:
        return self._fixed_width(self.dense.intermediate_size, asked)

    def check(self, config: MHMoEConfig) -> None:
        if config.num_moe_heads == 1:
            raise UserError(
                "--num-moe-heads 1 has no merge layer, which strategy exact starts at zero; give 2 or more"
            )

    def sources(self, name: str) -> tuple[str, ...]:
        return (name,) if ".mlp.shared_expert." in name else ()

    def value(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        if self.sources(name):
            return dense(name)
        if name.endswith(".mlp.gate.weight"):
            return self._router(name, shape, dense)
        return torch.zeros(shape) if name.endswith(".mlp.merge_layer.weight") else self._fresh(name, shape)
