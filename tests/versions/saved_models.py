"""`python saved_models.py FOLDER`: saves small models, and what they compute, for other versions to load."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification


HERE = Path(__file__).resolve().parent
sys.path[:0] = str(HERE), str(HERE.parent / "support")

from computed import computed  # noqa: E402
from tiny import tiny_config, tiny_model  # noqa: E402


MODELS = {
    "plain": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 1, 0],
        "use_qk_norm": True,
        "mlp_only_layers": [2],
        "shared_expert_intermediate_size": 16,
    },
    "P1": {
        "num_moe_heads": 4,
        "gated_mlp": False,
        "router_type": "xmoe",
        "head_merge_bias": True,
        "sub_token_residual": True,
        "router_bias_update_rate": 0.01,
    },
    "packed": {"use_bitnet": True},
    "classifier": {"num_labels": 3},
}


def main(folder: Path) -> None:
    for name, fields in MODELS.items():
        if name == "classifier":
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(tiny_config(initializer_range=0.1, **fields)).eval()
        else:
            model = tiny_model(**fields)
        (model.save_packed if name == "packed" else model.save_pretrained)(folder / name)
        torch.save(computed(type(model).from_pretrained(folder / name)), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
