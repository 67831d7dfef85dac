"""MH-MoE (Multi-Head Mixture-of-Experts) for Hugging Face Transformers. Importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import backends, peft_targets
from .configuration import MHMoEConfig
from .modeling_mhmoe import (
    MHMoEForCausalLM,
    MHMoEForQuestionAnswering,
    MHMoEForSequenceClassification,
    MHMoEForTokenClassification,
    MHMoEModel,
    MHMoEPreTrainedModel,
)
from .version import __version__


backends.register()
peft_targets.register()
AutoConfig.register("mhmoe", MHMoEConfig)
MHMoEConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, MHMoEModel),
    (AutoModelForCausalLM, MHMoEForCausalLM),
    (AutoModelForQuestionAnswering, MHMoEForQuestionAnswering),
    (AutoModelForSequenceClassification, MHMoEForSequenceClassification),
    (AutoModelForTokenClassification, MHMoEForTokenClassification),
):
    auto_class.register(MHMoEConfig, model_class)
    # makes save_pretrained copy the code that a machine without this package needs
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "MHMoEConfig",
    "MHMoEForCausalLM",
    "MHMoEForQuestionAnswering",
    "MHMoEForSequenceClassification",
    "MHMoEForTokenClassification",
    "MHMoEModel",
    "MHMoEPreTrainedModel",
    "__version__",
]
