import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tiny.py and what else the ordinary tests share


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, converted with the default strategy, in float32."""
    pytest.importorskip("gguf")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from fetch_smollm2 import fetch

    from mhmoe.conversion import convert

    folder = tmp_path_factory.mktemp("smollm2")
    fetch(folder / "dense")
    return convert(folder / "dense", folder / "mhmoe")
