"""
The encoders of transformers that have an MH-MoE twin, one row each. All else about a family is found by its model type
in transformers itself: its config, the classes of its heads, and the Auto classes that know them.

This file travels to the Hub: it imports nothing.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any


PREFIX = "MHMoE"  # of a twin's class
TYPE_PREFIX = "mhmoe_"  # of its model type


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        layer: the class of its layers, in each of which the FFN is either one module `mlp`, or a pair `intermediate`
            and `output`, of which the second adds the residual.
        picture_layer: that of the encoder of pictures, where it is another.
        towers: where the model has several encoders, the model types of their configs.
        mask_from: the class whose second output says which tokens are not padding, `(B, T)`, where the model makes
            its mask itself.
        patches_first: whether patches, of which none is padding, stand before the text in the same encoder.
    """

    layer: str
    picture_layer: str | None = None
    towers: tuple[str, ...] = ()
    mask_from: str | None = None
    patches_first: bool = False


FAMILIES = {  # by model type
    "bert": Family("BertLayer"),
    "roberta": Family("RobertaLayer"),
    "xlm-roberta": Family("XLMRobertaLayer"),
    "modernbert": Family("ModernBertEncoderLayer"),
    "vit": Family("ViTLayer"),
    "deit": Family("DeiTLayer"),
    "beit": Family("BeitLayer"),
    "dinov2": Family("Dinov2Layer"),
    "dinov2_with_registers": Family("Dinov2WithRegistersLayer"),
    "dinov3_vit": Family("DINOv3ViTLayer"),
    "yolos": Family("YolosLayer"),
    "clip": Family("CLIPEncoderLayer", towers=("clip_text_model", "clip_vision_model")),
    "siglip": Family("SiglipEncoderLayer", towers=("siglip_text_model", "siglip_vision_model")),
    "siglip2": Family("Siglip2EncoderLayer", towers=("siglip2_text_model", "siglip2_vision_model")),
    "git": Family("GitLayer", "GitVisionEncoderLayer", towers=("git_vision_model",), patches_first=True),
    "vilt": Family("ViltLayer", mask_from="ViltEmbeddings"),
    "flava": Family("FlavaLayer", towers=("flava_image_model", "flava_text_model", "flava_multimodal_model")),
}


def module_of(model_type: str) -> str:
    """The name of its folder in transformers.models."""
    return model_type.replace("-", "_")


FOLDERS = {module_of(model_type): family for model_type, family in FAMILIES.items()}


def dense_model_types() -> list[str]:
    """Of all configs that have a twin, those of towers included."""
    return [model_type for name, family in FAMILIES.items() for model_type in (name, *family.towers)]


def family_of(dense_class: type) -> Family | None:
    """Of a class of transformers, by where it stands; `None` where it has no twin."""
    parts = dense_class.__module__.split(".")  # transformers.models.vit.modeling_vit
    return FOLDERS.get(parts[2]) if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def twin_of(names: Any) -> Any:
    """The name of a twin's class, or those in a tuple of names."""
    return PREFIX + names if isinstance(names, str) else tuple(map(twin_of, names))


def register_names(modeling_auto: ModuleType) -> None:
    """Enter the twins, beside the dense classes, in all of transformers' tables of model classes by name."""
    tables = [
        table for name, table in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("_NAMES")
    ]
    for table in tables:
        for model_type in dense_model_types():
            if model_type in table:
                table[TYPE_PREFIX + model_type] = twin_of(table[model_type])


def auto_classes(modeling_auto: ModuleType) -> dict[str, Any]:
    """Transformers' Auto classes of models, by name."""
    classes = {name: of for name, of in vars(modeling_auto).items() if isinstance(of, type)}
    return {name: of for name, of in classes.items() if getattr(of, "_model_mapping", None) is not None}
