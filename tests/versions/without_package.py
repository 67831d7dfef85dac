"""
`python without_package.py FOLDER`: where `mhmoe` is not installed, loads what `saved_models.py` has saved there with
trust_remote_code=True, and compares. Nothing may warn but torch, which does when it is imported.
"""

import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from computed import computed


sys.modules["mhmoe"] = None  # which makes its import fail
said = []
TORCH = str(Path(torch.__file__).parent)


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


def main(folder: Path) -> None:
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, _, file, *__: file.startswith(TORCH) or said.append(f"{file}: {message}")
    logging.getLogger("transformers").addHandler(Listener())
    for expected in sorted(folder.glob("*.pt")):
        name = expected.stem
        auto = (
            transformers.AutoModelForSequenceClassification
            if name == "classifier"
            else transformers.AutoModelForCausalLM
        )
        model = auto.from_pretrained(folder / name, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        found, wanted = computed(model), torch.load(expected)
        assert (found["logits"] - wanted["logits"]).abs().max() <= 1e-6, name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not said, said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
