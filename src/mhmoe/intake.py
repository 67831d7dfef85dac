"""
The gate for every model folder that comes in, before anything of it is parsed by another library: which files may be
read, how large, how deep; and what its config and index may say. It reads JSON and the headers of weights alone.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import SHOWN, UserError, one_line


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
PROCESSOR_FILES = (  # and the files of sentence-transformers
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/config.json",
)
# read as JSON objects, and by this package
PARSED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
    "conversion.json",
    INDEX,
)
READ = {*PARSED, *TOKENIZER_FILES, *PROCESSOR_FILES, "*.safetensors"}
# of all these names only texts: LICENSE.env, say, is none
LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
TEXT_ENDINGS = ("", ".txt", ".md", ".rst", ".html", ".pdf")
MEGABYTE = 2**20
LARGEST = 16 * MEGABYTE  # bytes of a file, but for vocabularies, the index of a model of many tensors, and weights
LARGEST_OF = {"tokenizer.json": 256 * MEGABYTE, INDEX: 256 * MEGABYTE, "vocab.json": 64 * MEGABYTE}
LARGEST_OF |= {"tokenizer.model": 64 * MEGABYTE, "merges.txt": 64 * MEGABYTE}
FEW_LAYERS = 128  # which are built in no time
LARGEST_HEADER = 100 * 10**6  # bytes, as safetensors itself has it
DEEPEST, MOST_DIGITS = 64, 40

# the most that a size may be: beyond what anybody has trained, and far below what hangs or overflows
LIMITS = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**20,
    "intermediate_size": 2**23,
    "moe_intermediate_size": 2**23,
    "shared_expert_intermediate_size": 2**23,
    "vocab_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "num_moe_heads": 2**16,
    "moe_latent_size": 2**20,
    "num_experts": 2**20,
    "num_experts_per_tok": 2**20,
    "decoder_sparse_step": 4096,
    "router_dim": 2**20,
}
NUMBERS = ("rope_theta", "rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef")
STRINGS = ("model_type", "hidden_act", "dtype", "torch_dtype")
STRINGS += tuple(f"{mark}{part}_implementation" for mark in ("", "_") for part in ("attn", "experts"))
ATTENTIONS = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{number}" for number in (2, 3, 4)))
FLAGS = (
    *("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "bias", "use_qk_norm", "use_sliding_window"),
    *("norm_topk_prob", "gated_mlp", "head_merge_bias", "sub_token_residual", "use_bitnet", "bitnet_packed"),
)
ROPE = ("rope_scaling", "rope_parameters")
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MAPS = ("auto_map", "quantization_config", *ROPE)
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: one line that names the file, and the field and its value where it is one of those, for what cannot
            be right: a file that is none, or lies outside `folder`; JSON that is broken, too large or too deep; a
            config with sizes that no model has; an index that names files elsewhere.
    """
    for file in sorted({file for pattern in READ for file in _matching(folder, pattern)}):
        is_weights = file.suffix == ".safetensors"
        check_file(file, folder, math.inf if is_weights else LARGEST_OF.get(file.name, LARGEST))
    for name in PARSED:
        if name == INDEX and (folder / WEIGHTS).is_file():
            continue  # which is the whole model
        if (folder / name).is_file():
            values = read_json(folder / name)
            if name == "config.json":
                check_config(folder / name, values)
            elif name == INDEX:
                check_index(folder / name, values)
            elif name == "tokenizer_config.json":
                longest = values.get("model_max_length")  # 10^30 where there is no limit
                if isinstance(longest, bool) or not isinstance(longest, int | float | None):
                    raise UserError(f"{folder / name}: model_max_length={one_line(longest)} must be a number")
    _check_layers(folder)


def _check_layers(folder: Path) -> None:
    """A [`UserError`] where the config has more layers than there are tensors, before any layer is built."""
    config, names = folder / "config.json", _tensor_names(folder)
    layers = read_json(config).get("num_hidden_layers") if config.is_file() and names else None
    if layers is not None and layers > max(len(names), FEW_LAYERS):
        raise UserError(
            f"{config}: num_hidden_layers={layers} is more than the {len(names)} tensors of the weight files; do they "
            "belong together?"
        )


def _tensor_names(folder: Path) -> list[str]:
    """Of the weights in `folder`; none where there are none, or their header is broken, which who reads them says."""
    if not (folder / WEIGHTS).is_file():
        return list(read_json(folder / INDEX)["weight_map"]) if (folder / INDEX).is_file() else []
    with open(folder / WEIGHTS, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= LARGEST_HEADER else b""
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        return []
    return list(tensors) if isinstance(tensors, dict) else []


def own_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """
    The files in `folder` that match one of `patterns`, relative to it: those that may be copied. What lies elsewhere
    and is linked to, what is no file, and licences that are no texts, are not among them.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern) if _is_own(path, folder)}
    licenses = {path for pattern in LICENSE_FILES for path in folder.glob(pattern)}
    texts = {path for path in found if path not in licenses or _is_license_text(path)}
    return sorted(path.relative_to(folder) for path in texts)


def foreign_licenses(folder: Path) -> list[Path]:
    """What is named like a licence and is no text of `folder`: it is not copied."""
    named = {path for pattern in LICENSE_FILES for path in folder.glob(pattern)}
    own = {folder / name for name in own_files(folder, LICENSE_FILES)}
    return sorted(path for path in named - own if path.is_symlink() or not path.is_dir())


def _is_license_text(file: Path) -> bool:
    return file.suffix.lower() in TEXT_ENDINGS and file.stat().st_size <= LARGEST


def _is_own(file: Path, folder: Path) -> bool:
    try:
        check_file(file, folder, math.inf)
    except UserError:
        return False
    return True


def _matching(folder: Path, pattern: str) -> list[Path]:
    """As `Path.glob`, and a link to nothing too."""
    return list(folder.glob(pattern)) if "*" in pattern else [folder / pattern] * os.path.lexists(folder / pattern)


def check_file(file: Path, folder: Path | None, most_bytes: float = LARGEST) -> None:
    """
    A [`UserError`] unless `file` is a regular file in `folder`, or in the cache of the Hub that `folder` is of; with
    `None`, it may be anywhere.
    """
    try:
        target = file.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError in some versions
        raise UserError(f"{file}: cannot be read, or links to nothing; get the file again") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UserError(f"{file}: is {kind}, not a file; put the model's own file there")
    if folder is not None and not _within(target, folder):
        raise UserError(f"{file}: links to {target}, outside the folder; put a copy of that file there")
    if status.st_size > most_bytes:
        raise UserError(
            f"{file}: has {status.st_size:,} bytes, more than the {most_bytes:,} that such a file may have; "
            "is it the model's own?"
        )


def _within(target: Path, folder: Path) -> bool:
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # of the Hub's cache, whose files link to blobs beside the snapshots
        homes.append(home.parent.parent / "blobs")
    return any(target.is_relative_to(place) for place in homes)


def read_json(file: Path, hint: str = "get the file again", most_bytes: float | None = None) -> dict[str, Any]:
    """
    The JSON object in `file`.

    Args:
        hint: what to do about a file that is wrong.
        most_bytes: that it may have; by default as a model's file of this name.

    Raises:
        UserError: the file is missing, none, too large or not UTF-8, or holds what [`parse_json`] refuses.
    """
    try:
        if file.exists():
            check_file(file, None, most_bytes or LARGEST_OF.get(file.name, LARGEST))
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; {hint}") from error
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({one_line(error, SHOWN)}); {hint}") from error
    return parse_json(text, str(file), hint)


def parse_json(text: str, name: str, hint: str) -> dict[str, Any]:
    """
    The JSON object that `text` is, which messages call `name`.

    Raises:
        UserError: with `hint`, if it is no JSON object, or deeper or with longer numbers than any model's.
    """
    if _depth(text) > DEEPEST:
        raise UserError(f"{name}: is nested deeper than {DEEPEST}; {hint}")
    try:
        values = json.loads(text, parse_int=_integer)
    except ValueError as error:
        raise UserError(f"{name}: cannot be read as JSON ({one_line(error, SHOWN)}); {hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: holds no JSON object; {hint}")
    return values


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_config(file: Path, values: dict[str, Any]) -> None:
    """A [`UserError`] for sizes, numbers, names and token ids in a config that no model can have."""
    for field, most in LIMITS.items():
        value = values.get(field)
        if value is not None and not (type(value) is int and 0 <= value <= most):
            raise UserError(f"{file}: {field}={one_line(value)} must be a whole number up to {most:,}")
    for field in NUMBERS:
        _check_number(file, field, values.get(field))
    _check_above_zero(file, "rope_theta", values.get("rope_theta"))
    if not 0 <= (values.get("attention_dropout") or 0) <= 1:
        raise UserError(f"{file}: attention_dropout={values['attention_dropout']} must be from 0 to 1")
    for field in STRINGS:
        value = values.get(field)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()):
            raise UserError(f"{file}: {field}={one_line(value)} must be a short name")
    for field in ("_attn_implementation", "attn_implementation"):
        name = values.get(field)
        if name is not None and name.removeprefix("paged|") not in ATTENTIONS and "/" not in name:  # of the Hub
            raise UserError(f"{file}: {field}={one_line(name)} must be one of {', '.join(ATTENTIONS)}; remove it")
    for field in FLAGS:
        if not isinstance(values.get(field, False), bool | None):
            raise UserError(f"{file}: {field}={one_line(values[field])} must be true or false")
    for field in MAPS:
        if not isinstance(values.get(field), dict | None):
            raise UserError(f"{file}: {field}={one_line(values[field])} must be an object")
    for name, classes in (values.get("auto_map") or {}).items():
        if not all(isinstance(place, str | None) for place in (classes if isinstance(classes, list) else [classes])):
            raise UserError(f"{file}: auto_map.{one_line(name)}={one_line(classes)} must be the name of a class")
    for field in ROPE:
        rope = values.get(field) or {}
        of_layer_types = {f"{field}.{kind}": inner for kind, inner in rope.items() if isinstance(inner, dict)}
        for name, parameters in {field: rope, **of_layer_types}.items():
            for parameter in ROPE_NUMBERS:
                _check_number(file, f"{name}.{parameter}", parameters.get(parameter))
            _check_above_zero(file, f"{name}.rope_theta", parameters.get("rope_theta"))
    for field in TOKEN_IDS:
        ids = values.get(field)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None and type(token_id) is not int:
                raise UserError(f"{file}: {field}={one_line(ids)} must be a whole number, or a list of them")
    vocab_size, pad_token_id = values.get("vocab_size"), values.get("pad_token_id")
    if vocab_size is not None and pad_token_id is not None and not -vocab_size <= pad_token_id < vocab_size:
        raise UserError(f"{file}: pad_token_id={pad_token_id} must be below vocab_size={vocab_size}")


def _check_number(file: Path, field: str, value: Any) -> None:
    if value is not None and not (type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e18):
        raise UserError(f"{file}: {field}={one_line(value)} must be a number")


def _check_above_zero(file: Path, field: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise UserError(f"{file}: {field}={value} must be above 0")


def check_index(file: Path, values: dict[str, Any]) -> None:
    """A [`UserError`] for an index of weights that is no map of tensors to files of this folder."""
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: weight_map={one_line(weight_map)} must be a map of tensors to files; get it again")
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and name.isprintable() and len(name) <= 200 and name == Path(name).name):
            raise UserError(
                f"{file}: weight_map says that {one_line(tensor)} is in {one_line(name)}, which is no name of a file "
                "in this folder; get the index again"
            )
