"""Tiny models and a tiny tokenizer, made on the spot."""

import inspect
import math
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from mhmoe import MHMoEConfig, MHMoEForCausalLM


# what the installed transformers calls the cache, as an argument and as an output, and its argument of training
CACHE = "cache" if "cache" in inspect.signature(MixtralModel.forward).parameters else "past_key_values"
CHECKPOINTING = (
    "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
) + "_checkpointing"


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


def tiny_sparse_moe(model_type: str, num_experts: int = 5) -> PreTrainedModel:
    """One of transformers' own sparse MoEs, in evaluation mode: two layers, 2 experts for a token."""
    fields = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    if model_type.startswith("deepseek"):
        fields |= {"n_routed_experts": num_experts, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        fields |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        fields["head_dim"] = 4
    else:
        fields |= dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), num_experts)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()


def plan_names(model: torch.nn.Module) -> set[str]:
    """What rules of a parallel plan can name: modules and parameters, with an asterisk for each layer number."""
    named = (*model.named_parameters(), *model.named_modules())
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in named}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character (its code, from 3 on) after pad, bos and eos."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(code): code for code in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )


def save_dense(
    folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", family: str = "llama", **overrides
) -> Path:
    """A dense checkpoint, Llama's by default, with a tokenizer, a chat template, a licence and a card, in `folder`."""
    fields = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **overrides}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start at zero, and would hide a lost one
            torch.nn.init.normal_(parameter)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):  # which start at one
            torch.nn.init.uniform_(parameter, 0.5, 2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("You may.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Tiny\n")
    return folder


def perplexity_in_blocks(folder: str, token_ids: list[int], block_size: int) -> float:
    """Of a saved model, token by token in float64; what does not fill the last block is left out."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    log_likelihoods = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = torch.tensor(token_ids[start : start + block_size])
        with torch.no_grad():
            scores = model(input_ids=block[None]).logits[0, :-1].double().log_softmax(-1)
        log_likelihoods += scores[range(block_size - 1), block[1:]].tolist()
    return math.exp(-sum(log_likelihoods) / len(log_likelihoods))
