"""The rows of `mhmoe_smoke`, wherever this folder lies and whatever the working directory is."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask


ROWS = Path(__file__).with_name("mhmoe_smoke.jsonl")


class SmokeTask(ConfigurableTask):
    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
