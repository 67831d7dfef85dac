import os
from pathlib import Path

import pytest


# no test reaches the network; what tries to fails at once instead of waiting
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ["MHMOE_MEASURE"] = "0"  # the same ways to the products wherever the tests run


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the files in tests/golden anew")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora and benchmark rows beside the checkout; tests that want them skip where there are none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
