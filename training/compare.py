"""Pre-train several models on the same text and compare them: everything behind `mhmoe compare`."""

import gc
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import TrainingArguments

from mhmoe.configuration import PRESETS
from mhmoe.errors import UserError, WriteError, one_line
from mhmoe.files import check_writable, replacing, write_json, write_text, writing
from mhmoe.intake import read_json
from mhmoe.model_cards import markdown
from mhmoe.options import command_line

from .arguments import PretrainArguments
from .checkpoints import checkpoints
from .comparison import draw, summarise, table, table_by_text
from .pretrain import build_config, check_pretraining, load_texts, load_tokenizer, pretrain
from .pretrain_command import parser as pretrain_parser
from .report import REPORT, is_finished
from .rows import train_tokenizer
from .run import newest_checkpoint


SETTINGS = "compare.json"
WAY_OUT = "mend that, then the same command goes on"
OWN_FLAGS = ("preset", "config_name", "seed", "output_dir", "resume_from_checkpoint", "overwrite", "push_to_hub")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One model and one seed; `folder` holds all that it leaves."""

    model: str
    seed: int
    folder: Path
    pretraining: PretrainArguments
    training_args: TrainingArguments

    @property
    def name(self) -> str:
        return self.folder.name

    def report(self) -> dict | None:
        """Of a run that has finished."""
        try:
            report = read_json(self.folder / REPORT)
        except UserError:  # not begun, or not written to its end
            return None
        return report if is_finished(report) else None


def compare(models: list[str], seeds: list[int], output: Path, arguments: list[str]) -> tuple[list[dict], dict]:
    """
    Pre-train every model with every seed, as `mhmoe pretrain` does, each in a folder of `output`, which gets a table
    (`comparison.md`), curves (`comparison.png`) and both as JSON. Runs of an earlier call that finished are kept, the
    others are resumed, and more models or seeds may be asked for. A run that fails leaves the others alone.

    Args:
        models: names of presets, or folders with a config.json.
        seeds: of the random weights and of the order of the text, which all models share.
        output: a folder.
        arguments: those of `mhmoe pretrain` that hold for every run.

    Returns:
        The rows of [`summarise`], and for every run that failed what it failed of.

    Raises:
        UserError: the arguments cannot be used so, or `output` is of something else.
    """
    runs = plan_runs(models, seeds, output, arguments)
    if runs[0].training_args.disable_tqdm:
        disable_progress_bars()
    texts, _ = load_texts(runs[0].pretraining)
    if runs[0].pretraining.tokenizer_name is not None:  # which all of them would fail at
        load_tokenizer(runs[0].pretraining, texts)
    with writing(output, WAY_OUT):
        claim(output, arguments)
        share_tokenizer(runs, list(texts.values()), output)
    failures = {}
    for run in tqdm(runs, desc="runs", unit="run"):
        if run.report() is None:
            try:
                carry_out(run)
            except WriteError as error:  # which the others would meet too
                raise WriteError(error.what, WAY_OUT) from error
            except Exception as error:
                mistake = isinstance(error, UserError)  # which says all itself
                failures[run.name] = one_line(error) if mistake else f"{type(error).__name__}: {one_line(error)}"
                logger.warning("%s failed (%s)", run.name, failures[run.name], exc_info=None if mistake else error)
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        with writing(output, WAY_OUT):
            summary = write_comparison(runs, failures, output, arguments)
    return summary, failures


def with_underscores(arguments: list[str]) -> list[str]:
    """`--num-train-tokens` as `--num_train_tokens`: sets are compared by their arguments, in whichever spelling."""
    respelt = []
    for argument in arguments:
        flag, *value = argument.split("=", 1)
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        respelt.append("=".join([flag, *value]))
    return respelt


def plan_runs(models: list[str], seeds: list[int], output: Path, arguments: list[str]) -> list[Run]:
    """All runs, seed by seed, so that a set that is cut short compares all models; mistakes are found here."""
    for name, given in (("models", models), ("seeds", [*map(str, seeds)])):
        if repeated := {item for item in given if given.count(item) > 1}:
            raise UserError(f"{name}: {repeated.pop()} is given twice")
    for flag in OWN_FLAGS:
        if any(argument.split("=")[0] == f"--{flag}" for argument in with_underscores(arguments)):
            raise UserError(f"{flag}: not for mhmoe compare, which sets it itself for every run")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: mhmoe compare runs as one process")
    names = [model if model in PRESETS else Path(model).resolve().name for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"models: two of {', '.join(models)} would have the same folder")
    runs = []
    for seed in seeds:
        for model, name in zip(models, names, strict=True):
            folder = output / f"{name}-seed{seed}"
            kind = "config_name" if (Path(model) / "config.json").is_file() and model not in PRESETS else "preset"
            own = [f"--{kind}", model, "--seed", str(seed), "--output_dir", str(folder)]
            pretraining, training_args, _ = pretrain_parser("mhmoe compare").parse([*own, *arguments])
            check_pretraining(pretraining, training_args)
            build_config(pretraining)
            runs.append(Run(name, seed, folder, pretraining, training_args))
    return runs


def claim(output: Path, arguments: list[str]) -> None:
    """Make `output`, or make sure that it is an earlier call's with the same arguments."""
    settings = output / SETTINGS
    if settings.is_file():
        earlier = read_json(settings, "choose another output_dir").get("arguments")
        if not isinstance(earlier, list) or not all(isinstance(word, str) for word in earlier):
            raise UserError(f"{settings}: arguments={one_line(earlier)} are no words; choose another output_dir")
        if with_underscores(earlier) != with_underscores(arguments):
            raise UserError(
                f"output_dir={output}: holds runs with other options ({' '.join(earlier)}); choose another folder, "
                "since they could not be compared"
            )
        return
    check_writable(f"output_dir={output}", output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir={output}: is not empty, and not of mhmoe compare; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(settings, {"arguments": arguments})


def share_tokenizer(runs: list[Run], texts: list[Dataset], output: Path) -> None:
    """Where a tokenizer is to be trained, train one for all."""
    folder = output / "tokenizer"
    first = runs[0].pretraining
    if first.vocab_size is None:
        return
    if not folder.exists():
        partial = output / "tokenizer.partial"
        train_tokenizer(texts, first.vocab_size, first.block_size or 1024).save_pretrained(partial)
        partial.rename(folder)
    for run in runs:
        run.pretraining.vocab_size, run.pretraining.tokenizer_name = None, str(folder)


def carry_out(run: Run) -> None:
    """From the last whole checkpoint, if there is one. Afterwards the checkpoints are removed."""
    if checkpoint := newest_checkpoint(run.folder, run.training_args):
        run.training_args.resume_from_checkpoint = str(checkpoint)
    run.pretraining.overwrite = True  # of what a run that was cut short has left
    pretrain(run.pretraining, run.training_args)
    for checkpoint in checkpoints(run.folder):
        shutil.rmtree(checkpoint)


def write_comparison(runs: list[Run], failures: dict[str, str], output: Path, arguments: list[str]) -> list[dict]:
    models = list(dict.fromkeys(run.model for run in runs))
    in_order = sorted(runs, key=lambda run: models.index(run.model))
    reports = [report for run in in_order if (report := run.report()) is not None]
    summary = summarise(reports)
    arguments = [without_folders(part) for part in arguments]
    failures = {name: without_paths(reason) for name, reason in failures.items()}
    figures = {"arguments": arguments, "models": summary, "failures": failures, "runs": reports}
    write_json(output / "comparison.json", figures)
    with replacing(output / "comparison.png") as unfinished:
        draw(reports, unfinished)
    lines = [table(summary)]
    if reports:
        tokens, measured = reports[0]["curve"][-1]["tokens"], reports[0]["validation_tokens"]
        lines.append(
            f"After {tokens:,} tokens of training; perplexity on {measured:,} tokens of validation text, mean and "
            "standard deviation over the seeds. The last column is the difference to the first model with the same "
            "seed, which means the same text in the same order.\n"
        )
    if any(report["texts"] for report in reports):
        lines.append(f"Perplexity on each text:\n\n{table_by_text(reports)}")
    lines += [f"Failed: {markdown.plain(name)} ({markdown.plain(reason)}).\n" for name, reason in failures.items()]
    seeds = list(dict.fromkeys(str(run.seed) for run in runs))
    command = command_line(["mhmoe", "compare", "--models", *models, "--seeds", *seeds, *arguments])
    lines.append(f"{markdown.code(command)}\n\n![validation perplexity](comparison.png)\n")
    write_text(output / "comparison.md", "\n".join(lines))
    return summary


def without_folders(argument: str) -> str:
    """An argument as it may be published: of a path, the name, whatever folder it was in."""
    flag, separator, value = argument.rpartition("=")
    try:
        is_path = Path(value).is_absolute() or Path(value).exists()
    except OSError:  # too long for one
        is_path = False
    return flag + separator + Path(value).name if is_path else argument


def without_paths(reason: str) -> str:
    """What an exception says as it may be published: of an absolute path, the name."""
    quoted = re.sub(r"""(['"])/[^'"]*/([^'"/]+)\1""", r"\1\2\1", reason)
    return re.sub(r"(?<![\w.:/])/(?:[^/\s'\"]+/)+", "", quoted)
