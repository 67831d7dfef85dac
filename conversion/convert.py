"""Dense Llama checkpoint -> MH-MoE checkpoint."""

import json
import shlex
import shutil
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

from . import exact
from .checkpoint import LICENSE_FILES, TOKENIZER_FILES, DenseCheckpoint, read_json
from .families import carried_fields
from .sizes import default_moe_intermediate_size, default_num_moe_heads
from .staging import check_output, discard_stage, staged_folder
from .writer import PlannedTensor, plan_shards, write_shards


Strategy = Literal["exact"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
REPORT_NAME = "conversion.json"
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    strategy: Strategy = "exact",
    num_moe_heads: int | None = None,
    num_experts: int = 32,
    num_experts_per_tok: int = 2,
    moe_intermediate_size: int | None = None,
    dtype: Dtype = "auto",
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    revision: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Path:
    """
    Upcycle a dense Llama checkpoint into an MH-MoE checkpoint that is ready to upload.

    Args:
        source: folder, or model id on the Hub, with weights in safetensors.
        output: the folder to make; it appears when everything is in it, or not at all.
        strategy: "exact" keeps every logit to the bit: see `conversion/exact.py`.
        num_moe_heads: sub-tokens of a token; by default the largest of 4, 3, 2 that divides the hidden size.
        num_experts: routed experts per layer.
        num_experts_per_tok: experts per sub-token.
        moe_intermediate_size: inner size of a routed expert; the default is in `conversion/sizes.py`.
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
    checkpoint = DenseCheckpoint(source, revision)
    if not resume:
        check_output(output, overwrite, keep=checkpoint.folder)

    dense = checkpoint.config
    num_moe_heads = default_num_moe_heads(dense) if num_moe_heads is None else num_moe_heads
    if num_moe_heads == 1:
        raise UserError("--num-moe-heads 1 has no merge layer, which strategy exact starts at zero; give 2 or more")
    if moe_intermediate_size is None:
        moe_intermediate_size = default_moe_intermediate_size(dense, max(num_moe_heads, 1))
    sizes = {
        "num_moe_heads": num_moe_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": moe_intermediate_size,
    }
    config = _mhmoe_config(checkpoint, sizes, dtype)
    with torch.device("meta"):
        model = MHMoEForCausalLM(config)
    tensors = _plan_tensors(checkpoint, model, config.dtype if dtype != "auto" else None, seed)
    try:
        shards = plan_shards(tensors, max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size={max_shard_size!r} is no size; write it like 5GB or 500MB") from error
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    facts = {
        "command": _command(source, output, strategy, sizes, dtype, max_shard_size, seed, revision),
        "base_model": base_model or checkpoint.name,
        "versions": {name: version(name) for name in ("mhmoe", "torch", "transformers", "safetensors")},
    }
    if resume and _is_complete(output, facts, checkpoint):
        discard_stage(output)
        return output

    recipe = {
        "command": facts["command"],
        "base_model": facts["base_model"],
        "version of": facts["versions"],
        "source file": checkpoint.stamp(),
    }
    with (
        staged_folder(output, overwrite, checkpoint.folder, recipe, resume) as folder,
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
            "sizes": {**sizes, "shared_expert_intermediate_size": config.shared_expert_intermediate_size},
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


def _mhmoe_config(checkpoint: DenseCheckpoint, sizes: dict[str, int], dtype: Dtype) -> MHMoEConfig:
    fields = carried_fields(checkpoint.config)
    if dtype != "auto":
        fields["dtype"] = dtype
    elif fields.get("dtype") is None:
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
        fields["dtype"] = "float32" if len(stored) > 1 else str(TORCH_DTYPES[stored.pop()]).removeprefix("torch.")
    try:
        config = MHMoEConfig(
            **fields,
            **sizes,
            shared_expert_intermediate_size=checkpoint.config.intermediate_size,
            norm_topk_prob=True,
            architectures=[MHMoEForCausalLM.__name__],
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error
    return config


def _plan_tensors(
    checkpoint: DenseCheckpoint, model: MHMoEForCausalLM, dtype: torch.dtype | None, seed: int
) -> dict[str, PlannedTensor]:
    """What to write, in the model's order; all that does not fit is reported before anything is written."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unknown, misshapen, origin = [], [], {}
    for dense_name, stored in checkpoint.tensors.items():
        try:
            name = exact.target_name(dense_name)
        except KeyError:
            name = dense_name  # which no MH-MoE model has, or the table would
        if name is None:
            continue
        if name not in expected or stored.dtype not in TORCH_DTYPES:
            unknown.append(f"{dense_name} ({stored.dtype})")
        elif expected[name] != stored.shape:
            misshapen.append(f"{dense_name} is {stored.shape} but config.json asks for {expected[name]}")
        else:
            origin[name] = dense_name

    copied = set(map(exact.target_name, _dense_names(expected)))
    missing = sorted(copied - origin.keys())
    if model.config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} & origin.keys():
        missing = [name for name in missing if name not in ("lm_head.weight", "model.embed_tokens.weight")]
    for problem, found in (
        ("tensors that MH-MoE has no place for", unknown),
        ("tensors of other sizes", misshapen),
        ("lacks tensors", missing),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"{checkpoint.folder}: {problem}: {', '.join(found[:3])}{more}; is it a LlamaForCausalLM?")

    planned = {}
    for name, shape in expected.items():
        if name in origin:
            stored_dtype = TORCH_DTYPES[checkpoint.tensors[origin[name]].dtype]
            planned[name] = PlannedTensor(
                shape, dtype or stored_dtype, lambda dense_name=origin[name]: checkpoint.load(dense_name)
            )
        elif name not in copied:
            planned[name] = PlannedTensor(
                shape, model.config.dtype, lambda name=name, shape=shape: exact.initial_value(name, shape, seed)
            )
    return planned


def _dense_names(expected: dict[str, tuple[int, ...]]) -> list[str]:
    """The names, in the dense model, of those MH-MoE tensors that come from it."""
    names = [name.replace(".mlp.shared_expert.", ".mlp.") for name in expected]
    created = (".mlp.head_layer.", ".mlp.merge_layer.", ".mlp.gate.", ".mlp.experts.")
    return [name for name in names if not any(part in name for part in created)]


def _write_generation_config(checkpoint: DenseCheckpoint, folder: Path) -> None:
    file = checkpoint.folder / GENERATION_CONFIG_NAME
    if file.is_file():
        shutil.copyfile(file, folder / file.name)
    else:
        GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)


def _command(source, output, strategy, sizes, dtype, max_shard_size, seed, revision) -> str:
    """The command that makes the same files again, with every size named."""
    words = ["mhmoe", "convert", str(source), str(output), "--strategy", strategy]
    for field, value in (*sizes.items(), ("dtype", dtype), ("max_shard_size", max_shard_size), ("seed", seed)):
        words += [f"--{field.replace('_', '-')}", str(value)]
    return shlex.join(words + (["--revision", revision] if revision else []))


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(get_args(choices))}")
