"""
A folder for the Hub out of a checkpoint whose tensors are shared out among files: FSDP2's with SHARDED_STATE_DICT, or
DeepSpeed's. It needs no GPU, and memory for the weights in float32.

    python examples/hub_folder.py OUTPUT/checkpoint-1000 MODEL FOLDER
    hf upload ME/NAME FOLDER

MODEL is what the training started from: config, tokenizer and licences come from there.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from accelerate.utils import merge_fsdp_weights

from mhmoe.errors import UserError
from mhmoe.loading import load_causal_lm
from mhmoe.sources import find_folder
from mhmoe.training.run import copy_licenses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", help="folder or id on the Hub")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    try:
        make_hub_folder(options.checkpoint, options.model, options.output)
    except UserError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(f"{options.output}: the model of {options.checkpoint}")


def make_hub_folder(checkpoint: Path, model: str, output: Path) -> None:
    """
    Raises:
        UserError: the checkpoint is of another kind, does not fit the model, or `output` is there already.
    """
    if output.exists():
        raise UserError(f"{output}: exists; choose another folder")
    source, _ = find_folder(model, weights=False)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, Path(folder, file.name))
        gather(checkpoint, folder)
        trained, tokenizer, missing = load_causal_lm(folder)
        if missing:
            raise UserError(f"{checkpoint}: has not all tensors of {model}, {missing[0]} for one")
        made = Path(folder, "hub")
        trained.save_pretrained(made)
        tokenizer.save_pretrained(made)
        copy_licenses(source, made)
        made.rename(output)


def gather(checkpoint: Path, folder: str) -> None:
    """Whole tensors, in safetensors, in `folder`."""
    if (fsdp := checkpoint / "pytorch_model_fsdp_0").is_dir():
        merge_fsdp_weights(str(fsdp), folder, safe_serialization=True)
    elif any(checkpoint.glob("global_step*")):
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), folder, safe_serialization=True)
    else:
        raise UserError(f"{checkpoint}: no checkpoint of FSDP2 with SHARDED_STATE_DICT, and none of DeepSpeed")


if __name__ == "__main__":
    main()
