"""
Transformers' own model tests, on encoders with MH-MoE layers and, as the yardstick, on their dense twins.
`run_encoders.py` fetches the tests and runs this file, whose name keeps it out of the project's own test run.
"""

import unittest
from dataclasses import replace

import torch
from left_out import LEFT_OUT_CASES
from tiny_encoders import TINY, Tiny
from torch.utils._pytree import tree_leaves
from transformers_tests import test_modeling_common
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

import mhmoe


# by family: the classes that the cases run on, beside the one in `TINY`
CLASSES = {
    "vit": ("MHMoEViTModel",),
    "deit": ("MHMoEDeiTModel",),
    "yolos": ("MHMoEYolosModel",),
    "dinov2": ("MHMoEDinov2Model",),
    "beit": ("MHMoEBeitModel",),
    "dinov3_vit": (),
    "roberta": ("MHMoERobertaModel", "MHMoERobertaForSequenceClassification"),
    "xlm-roberta": ("MHMoEXLMRobertaModel",),
    "siglip2": (),
    "git": ("MHMoEGitModel",),
    "bert": ("MHMoEBertModel", "MHMoEBertForSequenceClassification", "MHMoEBertForTokenClassification"),
    "modernbert": ("MHMoEModernBertModel", "MHMoEModernBertForSequenceClassification"),
    "vilt": ("MHMoEViltModel",),
    "clip": (),
    "siglip": (),
    "flava": (),
}


# by family: how the name of cases begins that are left out, and why
NOT_ASKED = {
    "vilt": (
        "test_eager_matches_batched_and_grouped_inference",
        "left out: ViLT, the dense one too, draws the order of patches anew in each forward",
    ),
    "git": ("test_multimodal_outputs_are_returned", "left out: the case itself leaves GIT out, by its model type"),
}


def floating_outputs(outputs) -> list[torch.Tensor]:
    """All that experts multiplied in another way should not change; the library's own knows few names of outputs."""
    return [output for output in tree_leaves(dict(outputs)) if torch.is_tensor(output) and output.is_floating_point()]


test_modeling_common._get_output_tensors = floating_outputs


class Tester:
    """What the mixin asks about a model: its tiny config, and a batch for it."""

    is_training = True
    batch_size = 2

    def __init__(self, tiny: Tiny, dense: bool):
        self.tiny, self.dense = tiny, dense
        encoder = next(iter(tiny.towers.values())) if tiny.towers else tiny.fields
        self.hidden_size = encoder["hidden_size"]
        self.num_hidden_layers = encoder["num_hidden_layers"]
        self.num_attention_heads = encoder["num_attention_heads"]
        states = tiny.make(dense=True)(**tiny.inputs(), output_hidden_states=True).get("hidden_states")
        # a model of several encoders has none of its own
        self.seq_length = self.encoder_seq_length = 6 if states is None else states[-1].shape[1]
        if isinstance(encoder.get("image_size"), int):  # the cases mask as many of the first patches
            self.num_masks, self.mask_length = 1, (encoder["image_size"] // encoder["patch_size"]) ** 2

    def prepare_config_and_inputs_for_common(self):
        return self.tiny.config(self.dense), self.tiny.inputs()


class Cases(ModelTesterMixin):
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Tester(self.tiny, self.dense)
        fields = {} if self.tiny.towers else {**self.tiny.fields}
        fields.pop("num_labels", None)  # which is saved as labels
        self.config_tester = ConfigTester(
            self, config_class=self.all_model_classes[0].config_class, has_text_modality=False, **fields
        )

    def test_model_get_set_embeddings(self):
        if self.is_vision_model:
            self.skipTest("it is about embeddings of words")
        super().test_model_get_set_embeddings()

    def test_config(self):
        self.config_tester.run_common_tests()


for case, reason in LEFT_OUT_CASES.items():
    if hasattr(Cases, case):
        setattr(Cases, case, unittest.skip(f"left out: {reason}")(getattr(Cases, case)))

for family, others in CLASSES.items():
    twins = [getattr(mhmoe, name) for name in (*others, TINY[family].model)]
    for dense in (False, True):
        attributes = {
            "tiny": replace(TINY[family]),
            "dense": dense,
            "all_model_classes": tuple(twin.dense if dense else twin for twin in twins),
            "is_vision_model": "input_ids" not in TINY[family].inputs(),
        }
        if family in NOT_ASKED:
            start, reason = NOT_ASKED[family]
            cases = [case for case in dir(Cases) if case.startswith(start)]
            attributes |= {case: unittest.skip(reason)(getattr(Cases, case)) for case in cases}
        name = f"{family}{'_dense' if dense else ''}"
        globals()[name] = type(name, (Cases, unittest.TestCase), attributes)

del Cases, ModelTesterMixin
torch.set_num_threads(1)
