from mhmoe.registration import MODEL_CLASSES

from . import modeling_mhmoe
from .experts import register_experts
from .modeling_mhmoe import (
    MHMoEForCausalLM,
    MHMoEForQuestionAnswering,
    MHMoEForSequenceClassification,
    MHMoEForTokenClassification,
    MHMoEModel,
    MHMoEPreTrainedModel,
)
from .routers import register_router


for auto_class, model_class in MODEL_CLASSES.items():
    # makes save_pretrained copy the code that a machine without this package needs
    getattr(modeling_mhmoe, model_class).register_for_auto_class(auto_class)

__all__ = [
    "MHMoEForCausalLM",
    "MHMoEForQuestionAnswering",
    "MHMoEForSequenceClassification",
    "MHMoEForTokenClassification",
    "MHMoEModel",
    "MHMoEPreTrainedModel",
    "register_experts",
    "register_router",
]
