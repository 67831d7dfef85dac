"""The scripts of benchmarks/, which are no package, as modules."""

import importlib.util
from types import ModuleType

import pytest
from paths import ROOT


BENCHMARKS = ROOT / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """A new module of `benchmarks/NAME.py`, which finds its neighbours as where it is started."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec.loader.exec_module(module)
    return module
