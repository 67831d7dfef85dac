"""vLLM says what transformers says: all families of attention, all strategies, all variants of the layer."""

import json

import pytest
import torch


pytest.importorskip("vllm.version")  # tests/vllm alone would pass for vllm

from tiny import save_dense, tiny_model
from vllm_jobs import Job, assert_same, run_jobs, some_prompts, transformers_answers

from mhmoe.conversion import convert
from mhmoe.conversion.families import FAMILIES as KNOWN
from mhmoe.conversion.strategies import STRATEGIES


# vLLM's attention on CPUs knows a few head sizes, of which 32 is the smallest; 96 / 2 is no multiple of what its
# experts want
SIZES = {"hidden_size": 96, "head_dim": 32, "num_hidden_layers": 3, "max_position_embeddings": 256}
WINDOW = {"sliding_window": 6}  # shorter than most prompts
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES = {
    "llama": {"attention_bias": True},
    "mistral": WINDOW,
    "ministral": {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {**WINDOW, "attention_bias": True, "use_sliding_window": True, "max_window_layers": 2},
    "smollm3": {**WINDOW, "use_sliding_window": True, "no_rope_layers": [0, 1, 0]},
    "cwm": WINDOW,
    "internlm3": {"qkv_bias": True},
}
FAMILIES = {family: fields for family, fields in FAMILIES.items() if family in KNOWN}  # to vLLM's transformers
LAYERS = {
    "SwiGLU": {},
    "gelu": {"hidden_act": "gelu", "norm_topk_prob": True},
    "an activation that vLLM's experts lack": {"hidden_act": "relu"},
    "two matrices": {"gated_mlp": False, "mlp_only_layers": [0]},
    "shared expert": {"shared_expert_intermediate_size": 16, "mlp_bias": True, "attention_bias": True},
    "sparse MoE": {"num_moe_heads": 1, "shared_expert_intermediate_size": 16},
    "no layers": {"head_layer_depth": 0, "merge_layer_depth": 0},
    "deep layers": {"head_layer_depth": 2, "merge_layer_depth": 3, "head_merge_bias": True},
    "conv1d": {"token_split": "conv1d", "conv_kernel_size": 5, "head_merge_bias": True},
    "residual": {"sub_token_residual": True, "head_layer_depth": 0},
    "X-MoE": {"router_type": "xmoe"},
    "X-MoE, sigmoid": {"router_type": "xmoe", "scoring_func": "sigmoid", "norm_topk_prob": True},
    "bias balancing": {"router_bias_update_rate": 0.01},
    "P1": {
        "num_moe_heads": 3,
        "gated_mlp": False,
        "hidden_act": "relu",
        "router_type": "xmoe",
        "head_merge_bias": True,
        "sub_token_residual": True,
        "router_bias_update_rate": 0.01,
    },
}


def save_layer(folder, fields: dict) -> None:
    model = tiny_model(**{**SIZES, **fields})
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("bias", "log_temperature")):  # which start at zero, and would hide a lost one
            torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    text = root / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = ["".join(chr(code) for code in torch.randint(97, 122, (400,), generator=generator)) for _ in range(12)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    made = {}
    for family, fields in FAMILIES.items():
        dense = save_dense(root / family, family=family, intermediate_size=192, **SIZES, **fields)
        for strategy in STRATEGIES:
            options = {"num_moe_heads": 2, "num_experts": 6}
            if strategy == "calibrated":
                options |= {"calibration": text, "calibration_tokens": 900, "distillation_steps": 5}
            made[f"{family}, {strategy}"] = str(
                convert(dense, root / f"{family}-{strategy}", strategy=strategy, **options)
            )
    for name, fields in LAYERS.items():
        made[name] = str(root / name)
        save_layer(made[name], fields)
    return made


@pytest.fixture(scope="module")
def results(folders) -> dict[str, dict]:
    jobs = [Job(folder, some_prompts(), tokens=24) for folder in folders.values()]
    return dict(zip(folders, run_jobs(jobs), strict=True))


NAMES = [*(f"{family}, {strategy}" for family in FAMILIES for strategy in STRATEGIES), *LAYERS]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_transformers(folders, results, name):
    assert_same(results[name], transformers_answers(folders[name], some_prompts(), tokens=24))
