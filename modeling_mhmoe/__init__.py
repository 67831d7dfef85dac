from .modeling_mhmoe import (
    MHMoEForCausalLM,
    MHMoEForQuestionAnswering,
    MHMoEForSequenceClassification,
    MHMoEForTokenClassification,
    MHMoEModel,
    MHMoEPreTrainedModel,
)


__all__ = [
    "MHMoEForCausalLM",
    "MHMoEForQuestionAnswering",
    "MHMoEForSequenceClassification",
    "MHMoEForTokenClassification",
    "MHMoEModel",
    "MHMoEPreTrainedModel",
]
