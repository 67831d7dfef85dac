"""Dense checkpoint of the Llama family -> MH-MoE checkpoint."""

import hashlib
import json
import shlex
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME

from mhmoe import MHMoEConfig, MHMoEForCausalLM
from mhmoe.configuration import costs
from mhmoe.errors import UserError, one_line
from mhmoe.model_cards import write_model_card
from mhmoe.modeling_mhmoe.modeling_mhmoe import AUTO_MAP

from .anchored import Anchored
from .calibrated import Calibrated
from .calibration import read_rows
from .checkpoint import DTYPES, LICENSE_FILES, TOKENIZER_FILES, DenseCheckpoint, read_json
from .exact import Exact
from .families import carried_fields
from .random_experts import RandomExperts
from .staging import check_output, discard_stage, staged_folder
from .strategy import CALIBRATION_TOKENS, ConversionStrategy, RouterInit
from .tensors import dense_origin, load_dense, plan_tensors
from .writer import plan_shards, write_shards


Strategy = Literal["exact", "anchored", "calibrated", "random"]
STRATEGIES: dict[Strategy, type[ConversionStrategy]] = {
    "exact": Exact,
    "anchored": Anchored,
    "calibrated": Calibrated,
    "random": RandomExperts,
}
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
REPORT_NAME = "conversion.json"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    strategy: Strategy = "exact",
    num_moe_heads: int | None = None,
    num_experts: int = 32,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int | None = None,
    shared_expert_intermediate_size: int | None = None,
    norm_topk_prob: bool = True,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    router_init: RouterInit = "random",
    distillation_steps: int = 60,
    dtype: Dtype = "auto",
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    revision: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """
    Upcycle a dense checkpoint of the Llama family into an MH-MoE checkpoint that is ready to upload.

    Args:
        source: folder, or model id on the Hub, with weights in safetensors.
        output: the folder to make; it appears when everything is in it, or not at all.
        strategy: "exact" keeps every logit to the bit, "anchored" keeps them up to rounding and
            uses the experts from the first step on, "random" keeps all but the FFNs, which start untrained: each
            is described in its file, beside `conversion/exact.py`.
        num_moe_heads: sub-tokens of a token; by default the largest of 4, 3, 2 that divides the hidden size.
        num_experts: routed experts per layer.
        num_experts_per_tok: experts per sub-token.
        moe_intermediate_size: inner size of a routed expert; the default is in `conversion/sizes.py`.
        shared_expert_intermediate_size: inner size of the shared expert; by default what the strategy needs, which
            most strategies leave no choice in.
        norm_topk_prob: whether the weights of a sub-token's experts are scaled to sum to one.
        calibration: text for strategy "calibrated" and for `router_init`: see `conversion/calibration.py`.
        calibration_tokens: how much of it is used.
        router_init: the router's rows: "random", or "kmeans" for one balanced cluster of the calibration text's
            sub-tokens per expert.
        distillation_steps: of strategy "calibrated", per layer; see `conversion/distillation.py`.
        dtype: of the written tensors; "auto" keeps each as it is stored.
        max_shard_size: of a weight file, in bytes or as "5GB".
        seed: of the tensors that start random.
        revision: branch, tag or commit of `source` on the Hub.
        base_model: what the card names as base_model; by default the id on the Hub, or the folder's name.
        overwrite: replace an existing `output`, and start afresh where a conversion was cut short.
        resume: finish what the same conversion left in `OUTPUT.partial` when it was killed; a failure then leaves it
            there again. The files are the same, to the byte, as those of an undisturbed run.

    Returns:
        `output` as a path.

    Raises:
        UserError: the source cannot be converted, the sizes do not fit, or `output` may not be written.
    """
    output = Path(output)
    _check_choice("strategy", strategy, Strategy)
    _check_choice("dtype", dtype, Dtype)
    _check_choice("router_init", router_init, RouterInit)
    if distillation_steps < 0:
        raise UserError(f"--distillation-steps {distillation_steps}: give 0 for none, or more")
    checkpoint = DenseCheckpoint(source, revision)
    if not resume:
        check_output(output, overwrite, keep=checkpoint.folder)

    dense = checkpoint.config
    num_moe_heads = STRATEGIES[strategy].default_heads(dense) if num_moe_heads is None else num_moe_heads
    if moe_intermediate_size is None:
        moe_intermediate_size = STRATEGIES[strategy].default_inner_size(dense, max(num_moe_heads, 1))
    sizes = {
        "num_moe_heads": num_moe_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": moe_intermediate_size,
    }
    rows = _calibration_rows(checkpoint, strategy, calibration, calibration_tokens, router_init)
    text_options, text_facts = {}, {}
    if rows is not None:
        text_options = {
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "router_init": router_init,
            "distillation_steps": distillation_steps if STRATEGIES[strategy].needs_calibration else None,
        }
        with open(calibration, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        text_facts["calibration"] = {"file": Path(calibration).name, "sha256": digest, "tokens": rows.numel()}
    recipe = STRATEGIES[strategy](dense, sizes, seed, rows, router_init, distillation_steps)
    sizes["shared_expert_intermediate_size"] = recipe.shared_width(shared_expert_intermediate_size)
    config = _mhmoe_config(checkpoint, {**sizes, "norm_topk_prob": norm_topk_prob}, dtype)
    recipe.check(config)
    with torch.device("meta"):
        model = MHMoEForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    origin = dense_origin(checkpoint, shapes, config.tie_word_embeddings)
    load = partial(load_dense, checkpoint, origin)
    tensors = plan_tensors(checkpoint, shapes, origin, load, recipe, config.dtype, as_stored=dtype == "auto")
    try:
        shards = plan_shards(tensors, max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size={max_shard_size!r} is no size; write it like 5GB or 500MB") from error
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    facts = {
        "command": _command(
            source,
            output,
            {
                "strategy": strategy,
                **sizes,
                "norm_topk_prob": norm_topk_prob,
                **text_options,
                "dtype": dtype,
                "max_shard_size": max_shard_size,
                "seed": seed,
                "revision": revision,
            },
        ),
        **text_facts,
        "base_model": base_model or checkpoint.name,
        "versions": {name: version(name) for name in ("mhmoe", "torch", "transformers", "safetensors")},
    }
    if resume and _is_complete(output, facts, checkpoint):
        discard_stage(output)
        return output

    settings = {
        "command": facts["command"],
        "base_model": facts["base_model"],
        "version of": facts["versions"],
        "source file": checkpoint.stamp(),
    }
    if text_facts:  # what a text teaches is repeated to the bit by the same arithmetic alone
        settings |= text_facts
        settings["number of threads"] = torch.get_num_threads()
        settings["processor"] = torch.backends.cpu.get_cpu_capability()
    with (
        staged_folder(output, overwrite, checkpoint.folder, settings, resume) as folder,
        checkpoint.hashing() as hashes,
    ):
        missing = total_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
        if (free := shutil.disk_usage(folder).free) < missing:
            raise UserError(f"{output}: needs {missing / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=f"Converting {checkpoint.name}") as progress:
            write_shards(folder, shards, tensors, progress.update)
        _write_generation_config(checkpoint, folder)
        for name in checkpoint.files(TOKENIZER_FILES + LICENSE_FILES):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
        report = {
            "strategy": strategy,
            "command": facts["command"],
            "seed": seed,
            "dtype": str(config.dtype).removeprefix("torch."),
            "sizes": sizes,
            **text_facts,
            **({"figures": figures} if (figures := recipe.measured(load)) else {}),
            "source": {"name": checkpoint.name, "revision": revision, "sha256": hashes.result()},
            "base_model": facts["base_model"],
            "costs": {"dense": vars(costs(dense)), "mhmoe": vars(costs(config))},
            "versions": facts["versions"],
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        write_model_card(folder, report, source=checkpoint.folder)
        config.auto_map = dict(AUTO_MAP)
        custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)  # last: without it the folder is no model
    return output


def _is_complete(output: Path, facts: dict, checkpoint: DenseCheckpoint) -> bool:
    """Whether `output` holds the result of this very conversion, which may have been killed when all was done."""
    if not (output / REPORT_NAME).is_file():
        return False
    report = read_json(output / REPORT_NAME)
    return facts.items() <= report.items() and report["source"]["sha256"] == checkpoint.sha256()


def _mhmoe_config(checkpoint: DenseCheckpoint, mhmoe_fields: dict[str, int | bool], dtype: Dtype) -> MHMoEConfig:
    fields = carried_fields(checkpoint.config)
    if dtype != "auto":
        fields["dtype"] = dtype
    elif fields.get("dtype") is None:
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
        fields["dtype"] = "float32" if len(stored) > 1 else str(DTYPES[stored.pop()]).removeprefix("torch.")
    try:
        config = MHMoEConfig(
            **fields,
            **mhmoe_fields,
            architectures=[MHMoEForCausalLM.__name__],
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error
    return config


def _calibration_rows(
    checkpoint: DenseCheckpoint, strategy: Strategy, file: str | Path | None, max_tokens: int, router_init: RouterInit
) -> torch.Tensor | None:
    if file is None:
        if router_init == "kmeans":
            raise UserError("--router-init kmeans clusters a text; give --calibration FILE")
        return None
    if not STRATEGIES[strategy].needs_calibration and router_init == "random":
        raise UserError(
            f"--calibration {file}: strategy {strategy} uses no text; leave it out, or add --router-init kmeans"
        )
    return read_rows(checkpoint, Path(file), max_tokens)


def _write_generation_config(checkpoint: DenseCheckpoint, folder: Path) -> None:
    file = checkpoint.folder / GENERATION_CONFIG_NAME
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    else:
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


def _command(source: str | Path, output: Path, options: dict) -> str:
    """The command that makes the same files again, with every size named."""
    words = ["mhmoe", "convert", str(source), str(output)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "norm_topk_prob":
            words += [] if value else ["--no-norm-topk-prob"]
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(get_args(choices))}")
