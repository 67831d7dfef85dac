"""
Strategy `exact`: the dense FFN stays, as the always-on shared expert, and the merge layer starts at zero. The routed
path then adds an exact 0 to every token: the logits keep every bit, and the first training step moves the merge layer.
"""

import hashlib
import math
import re

import torch


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


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """
    The start of a tensor that the dense model has not, float32. It depends on seed, name and shape alone, so neither
    the order of writing nor the sharding changes it.

    Head layer: Xavier-uniform with gain 1/sqrt(2) (P1). Router and experts: normal with variance 1 / inputs, so that
    they carry the size of their input on, and no two experts are alike. Merge layer: zero.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    value = torch.empty(shape)
    if name.endswith(".mlp.merge_layer.weight"):
        return value.zero_()
    if name.endswith(".mlp.head_layer.weight"):
        return torch.nn.init.xavier_uniform_(value, gain=1 / math.sqrt(2), generator=generator)
    return value.normal_(0, shape[-1] ** -0.5, generator=generator)
