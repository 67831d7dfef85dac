"""
MH-MoE (Multi-Head Mixture-of-Experts) for Hugging Face Transformers. Importing it registers the Auto classes; torch,
transformers and the models are imported when one of the names below is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration
from .version import __version__


if TYPE_CHECKING:
    from mhmoe.configuration import MHMoEConfig
    from mhmoe.modeling_mhmoe import (
        MHMoEForCausalLM,
        MHMoEForQuestionAnswering,
        MHMoEForSequenceClassification,
        MHMoEForTokenClassification,
        MHMoEModel,
        MHMoEPreTrainedModel,
    )

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
MODULES = ("backends", "configuration", "conversion", "encoders", "errors", "evaluation", "modeling_mhmoe", "training")


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        home = ".configuration" if name == "MHMoEConfig" else ".modeling_mhmoe"
    elif name.startswith("MHMoE"):
        home = ".encoders"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(home, __name__), name)
    except AttributeError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *MODULES})


registration.register()
