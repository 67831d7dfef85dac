"""Tiny models and a tiny tokenizer, made on the spot."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mhmoe import MHMoEConfig, MHMoEForCausalLM


def tiny_config(**overrides) -> MHMoEConfig:
    """Two layers, d=48, 2 heads of sub-tokens, 6 experts; any field can be overridden."""
    fields = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_moe_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 0,
        "pad_token_id": 0,
    }
    return MHMoEConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> MHMoEForCausalLM:
    """A causal language model in evaluation mode, with weights large enough for experts to differ visibly."""
    torch.manual_seed(seed)
    return MHMoEForCausalLM(tiny_config(**{"initializer_range": 0.1, **overrides})).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte-like character (ids 3 to 127) after pad, bos and eos, so that any ASCII text has an encoding."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(code): code for code in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
