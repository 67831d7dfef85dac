"""
How transformers comes to know MH-MoE: by names, in the tables in which it keeps its own models. It looks a name up in
`transformers.models.MODEL_TYPE`, where this package stands, and only then is a class imported. The Auto classes'
public `register` takes classes, so that every `import mhmoe` would wait for torch and all models.
"""

import sys
from types import ModuleType

from .after_import import after_import


MODEL_TYPE = "mhmoe"
CONFIG_CLASS = "MHMoEConfig"
MODEL_CLASSES = {
    "AutoModel": "MHMoEModel",
    "AutoModelForCausalLM": "MHMoEForCausalLM",
    "AutoModelForQuestionAnswering": "MHMoEForQuestionAnswering",
    "AutoModelForSequenceClassification": "MHMoEForSequenceClassification",
    "AutoModelForTokenClassification": "MHMoEForTokenClassification",
}


def register() -> None:
    """Enter the model type, its classes and the experts backends, in whichever order modules are imported."""
    after_import("transformers.models.auto.configuration_auto", _enter_config)
    after_import("transformers.models.auto.modeling_auto", _enter_models)
    after_import("transformers.integrations.moe", _enter_backends)


def _enter_config(configuration_auto: ModuleType) -> None:
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules[__package__]
    configuration_auto.CONFIG_MAPPING_NAMES[MODEL_TYPE] = CONFIG_CLASS


def _enter_models(modeling_auto: ModuleType) -> None:
    for auto_class, model_class in MODEL_CLASSES.items():
        mapping = getattr(modeling_auto, auto_class)._model_mapping
        mapping._model_mapping[MODEL_TYPE] = model_class
        # made from the table of configs when the module was imported, perhaps before `_enter_config`
        mapping._reverse_config_mapping[CONFIG_CLASS] = MODEL_TYPE


def _enter_backends(_: ModuleType) -> None:
    from . import backends

    backends.register()
