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
TOKENS = 24
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
    "private experts": {"private_experts": True},
    "latent": {"moe_latent_size": 64, "router_input": "latent"},
    "router that sees tokens": {"router_input": "token"},
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


def answers_of(folders: dict[str, str]) -> dict[str, dict]:
    jobs = [Job(folder, some_prompts(), tokens=TOKENS) for folder in folders.values()]
    return dict(zip(folders, run_jobs(jobs), strict=True))


class TestConversions:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory) -> dict[str, str]:
        root = tmp_path_factory.mktemp("models")
        text = root / "text.jsonl"
        letters = torch.randint(97, 122, (12, 400), generator=torch.Generator().manual_seed(0)).tolist()
        text.write_text("".join(json.dumps({"text": bytes(row).decode()}) + "\n" for row in letters))
        made = {}
        for family, fields in FAMILIES.items():
            dense = save_dense(root / family, family=family, intermediate_size=192, **SIZES, **fields)
            for strategy in STRATEGIES:
                options = {"num_moe_heads": 2, "num_experts": 6}
                if strategy == "calibrated":
                    options |= {"calibration": text, "calibration_tokens": 900, "distillation_steps": 5}
                output = convert(dense, root / f"{family}-{strategy}", strategy=strategy, **options)
                made[f"{family}, {strategy}"] = str(output)
        return made

    @pytest.fixture(scope="class")
    def answers(self, folders) -> dict[str, dict]:
        return answers_of(folders)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_vllm_answers_as_transformers(self, folders, answers, family, strategy):
        name = f"{family}, {strategy}"
        assert_same(answers[name], transformers_answers(folders[name], some_prompts(), TOKENS))


class TestLayers:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory) -> dict[str, str]:
        root = tmp_path_factory.mktemp("models")
        for name, fields in LAYERS.items():
            model = tiny_model(**{**SIZES, **fields})
            for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor_name.endswith(("bias", "log_temperature")):  # which start at zero, and would hide a lost one
                    torch.nn.init.normal_(tensor, std=0.1)
            model.save_pretrained(root / name)
        return {name: str(root / name) for name in LAYERS}

    @pytest.fixture(scope="class")
    def answers(self, folders) -> dict[str, dict]:
        return answers_of(folders)

    @pytest.mark.parametrize("name", LAYERS)
    def test_vllm_answers_as_transformers(self, folders, answers, name):
        assert_same(answers[name], transformers_answers(folders[name], some_prompts(), TOKENS))
