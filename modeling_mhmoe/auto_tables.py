"""
Transformers' tables of model classes by name. `register` of the Auto classes leaves them as they are, but tools look
in them: Trainer's label smoothing (does a model's loss shift the labels?), pipelines, `transformers serve`, lm-eval.

This file travels to the Hub: it imports only transformers.
"""

from transformers.models.auto import modeling_auto


# Not CONFIG_MAPPING_NAMES, whose names are imported from transformers.models; TOKENIZER_MAPPING_NAMES says which
# tokenizer a family has, and MH-MoE has that of the model it was converted from.
TABLES = {
    "MODEL_MAPPING_NAMES": "MHMoEModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "MHMoEForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "MHMoEForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "MHMoEForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "MHMoEForQuestionAnswering",
}


def register_names() -> None:
    """Adds MH-MoE's classes to the tables."""
    for table, name in TABLES.items():
        getattr(modeling_auto, table)["mhmoe"] = name
