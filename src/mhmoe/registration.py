"""
How transformers comes to know MH-MoE: by names, in the tables in which it keeps its own models. It looks a name up in
`transformers.models.MODEL_TYPE`, where this package stands, and only then is a class imported. The Auto classes'
public `register` takes classes, so that every `import mhmoe` would wait for torch and all models.
"""

import sys
from types import ModuleType

from .after_import import after_import
from .encoders.families import TYPE_PREFIX, auto_classes, dense_model_types, module_of, register_names, twin_of


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
    after_import("transformers", _enter_attributes)
    after_import("transformers.models.auto.configuration_auto", _enter_config)
    after_import("transformers.models.auto.modeling_auto", _enter_models)
    after_import("transformers.integrations.moe", _enter_backends)
    after_import("peft.utils.constants", _enter_targets)


class _Class:
    """A class of this package as an attribute of another module's class, imported when it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: ModuleType | None, owner: type) -> type:
        return getattr(sys.modules["mhmoe"], self.name)


def _enter_attributes(_: ModuleType) -> None:
    # `transformers serve` and TRL look in transformers for the class that a config names. The module's own class has
    # it, since transformers, while it is imported, puts another module in its own place, and they may hold either.
    for model_class in MODEL_CLASSES.values():
        setattr(type(sys.modules["transformers"]), model_class, _Class(model_class))


def _enter_config(configuration_auto: ModuleType) -> None:
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules["mhmoe"]
    names = configuration_auto.CONFIG_MAPPING_NAMES
    names[MODEL_TYPE] = CONFIG_CLASS
    for dense_type in dense_model_types():
        if dense_type in names:
            names[TYPE_PREFIX + dense_type] = twin_of(names[dense_type])
            sys.modules[f"transformers.models.{TYPE_PREFIX}{module_of(dense_type)}"] = sys.modules["mhmoe"]


def _enter_models(modeling_auto: ModuleType) -> None:
    for auto_class, model_class in MODEL_CLASSES.items():
        getattr(modeling_auto, auto_class)._model_mapping._model_mapping[MODEL_TYPE] = model_class
    register_names(modeling_auto)
    names = modeling_auto.CONFIG_MAPPING_NAMES
    ours = {config: model_type for model_type, config in names.items() if model_type.startswith(MODEL_TYPE)}
    for auto_class in auto_classes(modeling_auto).values():
        # made from the table of configs when the module was imported, perhaps before `_enter_config`
        auto_class._model_mapping._reverse_config_mapping.update(ours)


def _enter_backends(_: ModuleType) -> None:
    from . import backends  # noqa: F401  which registers them


def _enter_targets(constants: ModuleType) -> None:
    # what PEFT's methods adapt where the user names nothing is what they adapt in Llama: by model type, modules, which
    # in MH-MoE are of attention and of shared experts
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])
