"""Dense checkpoint -> MH-MoE checkpoint."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from mhmoe.errors import SHOWN, UserError, one_line
from mhmoe.files import check_name, in_bytes
from mhmoe.intake import LICENSE_FILES, foreign_licenses, read_json
from mhmoe.loading import load_tokenizer
from mhmoe.model_cards import SourceCard, converted_card, is_hub_id, read_source_card

from .checkpoint import TOKENIZER_ITSELF, DenseCheckpoint
from .encoders import recipe_for
from .options import ConversionOptions
from .recipe import CalibrationText, Recipe
from .staging import check_output, discard_stage, staged_folder
from .tokenizer_code import drop_code, drop_tokenizer_code, tokenizer_code
from .writer import plan_shards, write_shards


REPORT_NAME = "conversion.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
SMALL_FILES = 2**20  # bytes that all but the weights may take


def convert(source: str | Path, output: str | Path, **options: Any) -> Path:
    """
    Upcycle a dense checkpoint, of the Llama family or an encoder, into an MH-MoE checkpoint that is ready to upload.

    Args:
        source: folder, or model id on the Hub, with weights in safetensors.
        output: the folder to make; it appears when everything is in it, or not at all.
        options: fields of [`ConversionOptions`], and the options of the chosen strategy.

    Returns:
        `output` as a path.

    Raises:
        UserError: the source cannot be converted, the sizes do not fit, or `output` may not be written.
        TypeError: there is no such option.
    """
    output, asked = Path(output), ConversionOptions.of(**options)
    check_name(str(output), output)
    checkpoint = DenseCheckpoint(source, asked.revision, code=asked.trust_remote_code)
    if not asked.resume:
        check_output(output, asked.overwrite, keep=checkpoint.folder)
    return write(recipe_for(checkpoint, asked), output)


def write(recipe: Recipe, output: Path) -> Path:
    """
    Make the folder `output` by a recipe.

    Raises:
        UserError: the tensors or the calibration text are not what the recipe needs, or `output` cannot be written.
    """
    checkpoint, options = recipe.checkpoint, recipe.options
    text = recipe.calibration_text()
    tensors, measured = recipe.plan_tensors(text)
    try:
        shards = plan_shards(tensors, options.max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size={options.max_shard_size!r} is no size; write it like 5GB or 500MB") from error
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        source_card, notes = read_source_card(checkpoint.folder / "README.md"), []
    except UserError as error:
        source_card, notes = SourceCard({}, None), [f"{error}; the new card goes without it"]
    facts = _facts(recipe, output, text, source_card)
    _card(recipe, _report(recipe, facts), source_card)  # what is wrong with a name shows here, not at the end
    if options.resume and _is_complete(output, facts, checkpoint):
        discard_stage(output)
        return output

    settings = _settings(recipe, facts, text, output)
    with (
        staged_folder(output, options.overwrite, checkpoint.folder, settings, options.resume) as folder,
        checkpoint.hashing() as hashes,
    ):
        missing = SMALL_FILES + total_bytes - sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
        if (free := shutil.disk_usage(folder).free) < missing:
            raise UserError(
                f"{output}: needs {in_bytes(missing)}, the disk has {in_bytes(free)} free; free more, or give another "
                "OUTPUT"
            )
        _copy_small_files(recipe, folder, facts.get("tokenizer_code", []))
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=f"Converting {checkpoint.name}") as progress:
            write_shards(folder, shards, tensors, progress.update)
        report = _report(recipe, facts, measured(), hashes.result())
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(_card(recipe, report, source_card), encoding="utf-8")
        recipe.write_config(folder)  # last: without it the folder is no model
    if facts["base_model"] is None:
        unknown = "neither its card nor its config names an id on the Hub, so the new card names no base_model"
        notes.append(f"{checkpoint.folder}: {unknown}; give --base-model OWNER/NAME for one")
    for note in notes:
        tqdm.write(note)
    return output


def _base_model(recipe: Recipe, source_card: SourceCard) -> str | None:
    """The id on the Hub that the card names, `None` where none is known."""
    loaded_from = getattr(recipe.dense_config, "_name_or_path", None)
    if not is_hub_id(loaded_from) or "/" not in loaded_from or Path(loaded_from).exists():
        loaded_from = None
    return recipe.options.base_model or recipe.checkpoint.hub_id or source_card.hub_id or loaded_from


def _facts(recipe: Recipe, output: Path, text: CalibrationText | None, source_card: SourceCard) -> dict:
    """What the report says of the conversion before it is made."""
    code = tokenizer_code(recipe.checkpoint.folder) if recipe.options.trust_remote_code else []
    return {
        "command": recipe.command(output),
        **({"calibration": text.facts} if text else {}),
        **({"tokenizer_code": code} if code else {}),
        "base_model": _base_model(recipe, source_card),
        "versions": {name: version(name) for name in ("mhmoe", "torch", "transformers", "safetensors")},
    }


def _settings(recipe: Recipe, facts: dict, text: CalibrationText | None, output: Path) -> dict:
    """All that decides the bytes, in the words of a message that says what is another now."""
    settings = {
        "command": recipe.command(output, paths=True),
        "base_model": facts["base_model"],
        "version of": facts["versions"],
        "source file": recipe.checkpoint.stamp(),
    }
    if text:  # what a text teaches is repeated to the bit by the same arithmetic alone
        settings["calibration"] = text.facts
        settings["number of threads"] = torch.get_num_threads()
        settings["processor"] = torch.backends.cpu.get_cpu_capability()
    return settings


def _report(
    recipe: Recipe,
    facts: dict,
    figures: dict | None = None,
    sha256: dict[str, str] | None = None,
) -> dict:
    """What `conversion.json` holds."""
    checkpoint, options = recipe.checkpoint, recipe.options
    return {
        "strategy": recipe.strategy.name,
        "command": facts["command"],
        "seed": options.seed,
        "dtype": str(recipe.config.dtype).removeprefix("torch."),
        "sizes": recipe.reported_sizes,
        **{name: facts[name] for name in ("calibration", "tokenizer_code") if name in facts},
        **({"figures": figures} if figures else {}),
        "source": {"name": checkpoint.name, "revision": options.revision, "sha256": sha256 or {}},
        "base_model": facts["base_model"],
        "costs": {name: vars(counted) for name, counted in recipe.costs.items()},
        "versions": facts["versions"],
    }


def _is_complete(output: Path, facts: dict, checkpoint: DenseCheckpoint) -> bool:
    """Whether `output` holds the result of this very conversion, which may have been killed when all was done."""
    if not (output / REPORT_NAME).is_file():
        return False
    report = read_json(output / REPORT_NAME)
    source = report.get("source")
    return facts.items() <= report.items() and isinstance(source, dict) and source.get("sha256") == checkpoint.sha256()


def _card(recipe: Recipe, report: dict, source_card: SourceCard) -> str:
    return converted_card(
        report,
        source_card.inherited,
        auto_class=recipe.auto_class,
        pipeline_tag=recipe.pipeline_tag,
        promise=recipe.strategy.promise.text,
        untrained=recipe.strategy.untrained,
        measured=recipe.strategy.describe(report["figures"]) if "figures" in report else "",
    )


def _copy_small_files(recipe: Recipe, folder: Path, code: list[str]) -> None:
    """Tokenizer, licence and generation config: before the weights, so that what cannot be read costs no time."""
    checkpoint = recipe.checkpoint
    names = checkpoint.files((*recipe.small_files, *LICENSE_FILES, "LICENSES/*", GENERATION_CONFIG_NAME))
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # which a killed conversion may have left cut off
    for name in [*names, *map(Path, code)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            content = (checkpoint.folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{checkpoint.folder / name}: cannot be read ({error.strerror})") from error
        (folder / name).write_bytes(content)
    for file in foreign_licenses(checkpoint.folder):
        tqdm.write(f"{file}: is no text of this folder, and is not copied")
    _check_tokenizer(recipe, folder)
    for name in PROCESSOR_CONFIGS:
        if drop_code(folder / name):
            named = f"{checkpoint.folder / name}: auto_map names code of its own"
            tqdm.write(f"{named}, which is not copied; the processor's plain class is used")
    if Path(GENERATION_CONFIG_NAME) in names:
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever a field of another type raises
            file = checkpoint.folder / GENERATION_CONFIG_NAME
            raise UserError(f"{file}: cannot be loaded ({one_line(error, SHOWN)}); mend or remove it") from error
    elif recipe.generates:
        try:
            GenerationConfig.from_model_config(checkpoint.config).save_pretrained(folder)
        except ValueError as error:
            raise UserError(
                f"{checkpoint.folder / CONFIG_NAME}: its fields for generation do not go together ({one_line(error)})"
            ) from error


def _check_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Leave its code out where it is not trusted; a [`UserError`] where the tokenizer then cannot be loaded."""
    checkpoint, trusted = recipe.checkpoint, recipe.options.trust_remote_code
    dropped = not trusted and drop_tokenizer_code(folder)
    if not checkpoint.files(TOKENIZER_ITSELF):
        return
    named = f"{checkpoint.folder / TOKENIZER_CONFIG_FILE}: auto_map names code of its own"
    try:
        load_tokenizer(folder, str(checkpoint.folder), trust_remote_code=trusted)
    except UserError as error:
        if not dropped:
            raise
        raise UserError(
            f"{named}, without which {error}; read that code, and add --trust-remote-code to run and copy it"
        ) from error
    if dropped:
        tqdm.write(f"{named}, which is not copied; the tokenizer's plain class is used")
