import sys
from pathlib import Path

import pytest
from paths import ROOT

from mhmoe.conversion import convert


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, converted with the default strategy, in float32."""
    sys.path.insert(0, str(ROOT / "examples"))
    from fetch_smollm2 import fetch

    folder = tmp_path_factory.mktemp("smollm2")
    fetch(folder / "dense")
    return convert(folder / "dense", folder / "mhmoe")
