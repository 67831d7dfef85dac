"""Dense models of every family, with what their attention can have."""

import torch
from tiny import save_dense

from mhmoe.conversion.families import FAMILIES


WINDOW = {"sliding_window": 6}  # shorter than any row below
FULL, SLIDING = "full_attention", "sliding_attention"
# name: (family, fields of the dense config, what the MH-MoE config makes of them)
VARIANTS = {
    "llama": ("llama", {"attention_bias": True}, {"attention_out_bias": True, "layer_types": [FULL] * 3}),
    "mistral": ("mistral", WINDOW, {**WINDOW, "layer_types": [SLIDING] * 3}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16}, {"layer_types": [FULL] * 3}),
    "ministral": (
        "ministral",
        {**WINDOW, "head_dim": 12, "layer_types": [SLIDING, FULL, SLIDING]},
        {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen2": ("qwen2", {"sliding_window": 6}, {"attention_bias": True, "attention_out_bias": False}),
    "qwen2, window from a layer on": (
        "qwen2",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
        {**WINDOW, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "qwen2, layer_types": (
        "qwen2",
        {**WINDOW, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]},
        {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen3": ("qwen3", {"head_dim": 20}, {"use_qk_norm": True, "head_dim": 20, "attention_bias": False}),
    "qwen3, biases and windows": (
        "qwen3",
        {**WINDOW, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 2},
        {"attention_bias": True, "attention_out_bias": True, "layer_types": [FULL, FULL, SLIDING]},
    ),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [1, 0, 1], "layer_types": [FULL] * 3, "tie_word_embeddings": True},
    ),
    "smollm3, biases and windows": (
        "smollm3",
        {
            **WINDOW,
            "use_sliding_window": True,
            "no_rope_layers": [0, 1, 0, 1],
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"no_rope_layers": [0, 1, 0], "layer_types": [SLIDING, FULL, SLIDING], "mlp_bias": True},
    ),
    "cwm": ("cwm", {**WINDOW, "head_dim": 16}, {**WINDOW, "layer_types": [FULL, SLIDING, SLIDING]}),
    "internlm3": ("internlm3", {"qkv_bias": True, "bias": True, "head_dim": 16}, {"attention_out_bias": True}),
}


VARIANTS = {name: variant for name, variant in VARIANTS.items() if variant[0] in FAMILIES}


def save_variant(folder, variant: str, dtype: torch.dtype = torch.float32):
    family, overrides, _ = VARIANTS[variant]
    return save_dense(folder, dtype, max_shard_size="40KB", family=family, num_hidden_layers=3, **overrides)
