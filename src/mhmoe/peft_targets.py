"""What PEFT's methods adapt in MH-MoE where the user names nothing: what they adapt in Llama."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


CONSTANTS = "peft.utils.constants"


def register() -> None:
    """Adds "mhmoe" to PEFT's tables of defaults, now or when PEFT is imported: its import takes seconds."""
    if CONSTANTS in sys.modules:
        _add_to(sys.modules[CONSTANTS])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _add_to(constants: ModuleType) -> None:
    for name, table in vars(constants).items():
        # by model type, modules to adapt; in MH-MoE these are of attention and of shared experts
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault("mhmoe", table["llama"])


class _WhenImported(MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                _add_to(module)

            spec.loader.exec_module = execute_and_add
        return spec
