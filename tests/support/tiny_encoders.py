"""Tiny encoders with MH-MoE layers, one for each family, and something for each to read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

import mhmoe


ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": 64, "max_position_embeddings": 16, "pad_token_id": 0}
MOE = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 16}
SHARED = 48  # an inner size, of dense FFNs and so of shared experts


def tokens(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [8, 9, 5, 2, 0, 0]])[:rows]
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def picture(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def both() -> dict[str, torch.Tensor]:
    return tokens() | picture()


def patches() -> dict[str, torch.Tensor]:
    """For SigLIP2: of a picture of 2 x 2 patches, and of one of 1 x 3 that is filled up to four."""
    return {
        "pixel_values": torch.randn(2, 4, 3 * 4 * 4, generator=torch.Generator().manual_seed(1)),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "spatial_shapes": torch.tensor([[2, 2], [1, 3]]),
    }


@dataclass(frozen=True)
class Tiny:
    """A model of one family: its class, the dense config's fields, or those of each tower, and its inputs."""

    model: str
    fields: dict
    inputs: Callable[[], dict[str, torch.Tensor]]
    towers: dict[str, dict] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    shared: int = SHARED

    def config(self, dense: bool = False, **moe):
        """Of the twin, whose dense FFNs are its shared experts unless `moe` says otherwise; or of the dense model."""
        moe = {} if dense else {**MOE, "shared_expert_intermediate_size": self.shared, **moe}
        losses = {name: moe.pop(name) for name in list(moe) if name in mhmoe.encoders.LOSS_FIELDS}
        model = self.dense_class if dense else self.model_class
        towers = {name: {**fields, **moe} for name, fields in self.towers.items()}
        own = moe if "num_hidden_layers" in self.fields else {}  # of an encoder, beside or without others
        return model.config_class(**self.fields, **own, **towers, **losses)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(mhmoe, self.model)

    @property
    def dense_class(self) -> type[PreTrainedModel]:
        return self.model_class.dense

    def make(self, dense: bool = False, **moe) -> PreTrainedModel:
        """In evaluation mode, with weights that let experts differ visibly."""
        torch.manual_seed(0)
        model = (self.dense_class if dense else self.model_class)(self.config(dense, **moe)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:  # norms and biases, which start alike
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


VIT = {**ENCODER, **PICTURE, "num_labels": 3, "initializer_range": 0.2}
BERT = {**ENCODER, **TEXT, "num_labels": 3, "initializer_range": 0.2}
DINOV3 = {**ENCODER, **PICTURE, "initializer_range": 0.2, "num_register_tokens": 1}
LABELS = torch.tensor([1, 2])
MASKED = torch.tensor([[-100, 6, -100, 8, -100, -100], [-100, 9, -100, -100, -100, -100]])
TINY = {
    "vit": Tiny("MHMoEViTForImageClassification", VIT, picture, labels=LABELS),
    "deit": Tiny("MHMoEDeiTForImageClassification", VIT, picture, labels=LABELS),
    "beit": Tiny("MHMoEBeitForImageClassification", {**VIT, "drop_path_rate": 0.0}, picture, labels=LABELS),
    "beit-segmentation": Tiny(
        "MHMoEBeitForSemanticSegmentation",
        {
            **{**VIT, "num_hidden_layers": 4, "drop_path_rate": 0.0, "image_size": 64, "patch_size": 16},
            **{"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "add_fpn": True},
        },
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))},
        labels=torch.arange(2 * 64 * 64).view(2, 64, 64) % 3,
    ),
    "dinov2": Tiny(
        "MHMoEDinov2ForImageClassification",
        {**{name: value for name, value in VIT.items() if name != "intermediate_size"}, "mlp_ratio": 2},
        picture,
        labels=LABELS,
        shared=64,
    ),
    "dinov2-swiglu": Tiny(
        "MHMoEDinov2Model",
        {
            **{name: value for name, value in VIT.items() if name != "intermediate_size"},
            **{"mlp_ratio": 2, "use_swiglu_ffn": True},
        },
        picture,
        shared=48,
    ),
    "dinov2-backbone": Tiny(
        "MHMoEDinov2Backbone",
        {
            **{name: value for name, value in VIT.items() if name != "intermediate_size"},
            **{"mlp_ratio": 2, "out_indices": [1, 2], "reshape_hidden_states": False},
        },
        picture,
        shared=64,
    ),
    "dinov2_with_registers": Tiny(
        "MHMoEDinov2WithRegistersForImageClassification",
        {**{name: value for name, value in VIT.items() if name != "intermediate_size"}, "mlp_ratio": 2},
        picture,
        labels=LABELS,
        shared=64,
    ),
    "dinov3_vit": Tiny("MHMoEDINOv3ViTModel", DINOV3, picture),
    "dinov3_vit-gated": Tiny("MHMoEDINOv3ViTModel", {**DINOV3, "use_gated_mlp": True, "mlp_bias": False}, picture),
    "yolos": Tiny("MHMoEYolosForObjectDetection", {**VIT, "image_size": [8, 8], "num_detection_tokens": 3}, picture),
    "bert": Tiny("MHMoEBertForMaskedLM", BERT, tokens, labels=MASKED),
    "bert-classification": Tiny("MHMoEBertForSequenceClassification", BERT, tokens, labels=LABELS),
    "roberta": Tiny("MHMoERobertaForMaskedLM", {**BERT, "max_position_embeddings": 24}, tokens, labels=MASKED),
    "xlm-roberta": Tiny(
        "MHMoEXLMRobertaForSequenceClassification", {**BERT, "max_position_embeddings": 24}, tokens, labels=LABELS
    ),
    "modernbert": Tiny(
        "MHMoEModernBertForMaskedLM",
        {**BERT, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        tokens,
        labels=MASKED,
    ),
    "clip": Tiny(
        "MHMoECLIPModel",
        {"projection_dim": 16},
        both,
        towers={
            "text_config": {**ENCODER, **TEXT, "eos_token_id": 2, "bos_token_id": 1},
            "vision_config": {**ENCODER, **PICTURE},
        },
    ),
    "siglip": Tiny(
        "MHMoESiglipModel",
        {},
        lambda: {"input_ids": tokens()["input_ids"], **picture()},
        towers={"text_config": {**ENCODER, **TEXT, "projection_size": 32}, "vision_config": {**ENCODER, **PICTURE}},
    ),
    "siglip2": Tiny(
        "MHMoESiglip2Model",
        {},
        lambda: tokens() | patches(),
        towers={
            "text_config": {**ENCODER, **TEXT, "projection_size": 32},
            "vision_config": {**ENCODER, "patch_size": 4, "num_patches": 4},
        },
    ),
    "git": Tiny(
        "MHMoEGitForCausalLM",
        {**ENCODER, **TEXT, "initializer_range": 0.2},
        both,
        towers={"vision_config": {**ENCODER, **PICTURE}},
        labels=tokens()["input_ids"],
    ),
    "vilt": Tiny("MHMoEViltForMaskedLM", {**BERT, **PICTURE}, both, labels=MASKED),
    "vilt-vqa": Tiny(
        "MHMoEViltForQuestionAnswering", {**BERT, **PICTURE}, both, labels=torch.tensor([[1.0, 0, 0], [0, 0.5, 1]])
    ),
    "vilt-pairs": Tiny(
        "MHMoEViltForImagesAndTextClassification",
        {**BERT, **PICTURE, "num_images": 2, "modality_type_vocab_size": 3},
        lambda: tokens() | {"pixel_values": torch.stack([picture()["pixel_values"]] * 2, dim=1)},
        labels=LABELS,
    ),
    "vilt-retrieval": Tiny("MHMoEViltForImageAndTextRetrieval", {**BERT, **PICTURE}, both),
    "flava": Tiny(
        "MHMoEFlavaModel",
        {"projection_dim": 16, "hidden_size": 32},
        both,
        towers={
            "image_config": {**ENCODER, **PICTURE},
            "text_config": {**ENCODER, **TEXT},
            "multimodal_config": ENCODER,
        },
    ),
}
