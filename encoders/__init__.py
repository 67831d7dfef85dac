"""
MH-MoE twins of transformers' encoders: `MHMoEViTConfig`, `MHMoEViTForImageClassification`, `MHMoEBertModel`, ... They
are made, and transformers' modules are imported, when they are asked for.
"""

import importlib
from typing import Any

from .families import FAMILIES, PREFIX


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX) and name != "LOSS_FIELDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = "configuration" if name.endswith(("Config", "_FIELDS")) else "modeling"
    return getattr(importlib.import_module(f".{file}_mhmoe_encoders", __name__), name)


__all__ = ["FAMILIES"]
