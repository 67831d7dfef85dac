"""
Transformers' own model tests, on the MH-MoE classes and, as the yardstick, on Mixtral's. `run.py` fetches the tests
and runs this file, whose name keeps it out of the project's own test run.
"""

import unittest

import torch
from left_out import LEFT_OUT_CASES
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
    set_seed,
)
from transformers.testing_utils import torch_device
from transformers_tests import (
    test_executorch,
    test_expert_parallel_mixin,
    test_fsdp_mixin,
    test_tensor_parallel_mixin,
)
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

from mhmoe import (
    MHMoEConfig,
    MHMoEForCausalLM,
    MHMoEForQuestionAnswering,
    MHMoEForSequenceClassification,
    MHMoEForTokenClassification,
    MHMoEModel,
)


# The distributed tests run for a few chosen model types; None opens them to all.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
# Ranks on the CPU may outnumber its cores.
test_fsdp_mixin._get_available_fsdp_workers = lambda: 8

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}


class ModelTester:
    """What the mixins ask about a model: its classes, a tiny config and a batch, right-padded to a staircase."""

    batch_size = 7
    seq_length = 7
    is_training = True

    def __init__(self, config_class: type, model_classes: tuple[type, ...], fields: dict):
        self.config_class = config_class
        self.base_model_class, self.causal_lm_class = model_classes[:2]
        self.fields = fields
        self.hidden_size = fields["hidden_size"]
        self.num_hidden_layers = fields["num_hidden_layers"]
        self.num_attention_heads = fields["num_attention_heads"]

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.fields["vocab_size"])  # (B, T)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class UpstreamCases(
    ModelTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
    TrainingTesterMixin,
    test_executorch.ExecutorchTest,
):
    """Every case that applies to a decoder; subclasses name the model."""

    config_class = None
    fields = {}
    test_can_init_all_missing_weights_before_2023 = True  # else skipped for want of a dated licence header

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, self.all_model_classes, self.fields)
        self.config_tester = ConfigTester(self, config_class=self.config_class, **self.fields)
        # for the cases of ExecutorchTest, whose own setUp takes a Llama from the Hub
        set_seed(42)
        self.model = self.model_tester.causal_lm_class(self.model_tester.get_config()).to(torch_device).eval()
        self.model.generation_config = GenerationConfig(
            use_cache=True,
            cache_implementation="static",
            cache_config={"batch_size": 1, "max_cache_len": 32, "device": torch_device},
        )
        self.input_ids = torch.tensor([[1, 2, 3]], device=torch_device)
        self.inputs_embeds = torch.randn(1, 3, self.model_tester.hidden_size, device=torch_device)
        self.cache_position = torch.arange(3, device=torch_device)

    def test_config(self):
        self.config_tester.run_common_tests()


for name, reason in LEFT_OUT_CASES.items():
    setattr(UpstreamCases, name, unittest.skip(f"left out: {reason}")(getattr(UpstreamCases, name)))


class MHMoE(UpstreamCases):
    """Two sub-tokens, a shared expert, and a first layer that stays dense."""

    config_class = MHMoEConfig
    all_model_classes = (
        MHMoEModel,
        MHMoEForCausalLM,
        MHMoEForSequenceClassification,
        MHMoEForTokenClassification,
        MHMoEForQuestionAnswering,
    )
    _torch_compile_train_cls = MHMoEForCausalLM
    fields = {
        **TINY,
        "num_moe_heads": 2,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    }


class PlainMoE(MHMoE):
    """The papers' baseline from the same code: whole tokens, no shared expert, every layer sparse."""

    fields = {
        **TINY,
        "num_moe_heads": 1,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    }


class Mixtral(UpstreamCases):
    config_class = MixtralConfig
    all_model_classes = (
        MixtralModel,
        MixtralForCausalLM,
        MixtralForSequenceClassification,
        MixtralForTokenClassification,
        MixtralForQuestionAnswering,
    )
    _torch_compile_train_cls = MixtralForCausalLM
    fields = {**TINY, "num_local_experts": 8, "head_dim": 8}  # its scaled RoPE wants head_dim named


del UpstreamCases
