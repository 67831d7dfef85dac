"""What every training run is made of: its output folder, Trainer, the save, and what comes after it."""

import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from mhmoe.errors import UserError, WriteError, one_line
from mhmoe.files import check_writable, refusal_of, writing
from mhmoe.intake import LICENSE_FILES, foreign_licenses, own_files

from .arguments import RunSettings
from .checkpoints import checkpoints, fault_of, named_as_file, newest_whole
from .data import causal_batch
from .quality import TokenQuality, token_predictions
from .sharding import check_sharding, refusals_in_one_line
from .streaming import StreamCallback, TextStream, resume_stream
from .teacher import Teacher
from .trainer import MHMoETrainer


logger = logging.getLogger(__name__)


def prepare_output(output: Path, source: Path | None, overwrite: bool, training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from, `None` to start anew.

    Raises:
        UserError: there is no such checkpoint, or it is not whole; `output` cannot be written to, or holds something
            that was not meant to be written over.
    """
    if os.path.exists(output) and not os.path.isdir(output):  # which know names that no file can have, too
        raise UserError(f"output_dir={output}: a file; choose another folder")
    check_writable(f"output_dir={output}", output)
    written = [*output.iterdir(), *output.glob("additional_chat_templates/*")] if output.is_dir() else []
    _check_replaceable(written)
    if source is not None and output.resolve() == source.resolve():
        raise UserError(f"output_dir={output}: holds the model to train; choose another folder")
    if training_args.resume_from_checkpoint:
        checkpoint = _checkpoint_to_resume(output, training_args)
        for newer in takewhile(lambda folder: folder != checkpoint, checkpoints(output)):
            _check_replaceable(newer.iterdir())
        return str(checkpoint)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"output_dir={output}: is not empty; choose another folder, continue with --resume_from_checkpoint true, "
            "or --overwrite"
        )
    return None


def _check_replaceable(paths: Iterable[Path]) -> None:
    """A [`UserError`] where something lies that saving cannot write over: a link, a pipe, a folder named as a file."""
    for path in paths:
        if named_as_file(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path}: is no file that the model's own can take the place of; remove it")


def _checkpoint_to_resume(output: Path, training_args: TrainingArguments) -> Path:
    wanted = str(training_args.resume_from_checkpoint)
    if wanted.lower() == "true":
        checkpoint = newest_checkpoint(output, training_args)
        reason = "" if checkpoint or not checkpoints(output) else " that is whole"
    else:
        checkpoint, fault = Path(wanted), fault_of(Path(wanted), training_args.save_only_model)
        if fault:
            checkpoint, reason = None, f" that is whole ({fault})"
    if checkpoint is None:
        raise UserError(
            f"resume_from_checkpoint={wanted}: no checkpoint of Trainer{reason}; give its folder, or `true` for the "
            f"last whole one in output_dir={output}"
        )
    return checkpoint


def newest_checkpoint(output: Path, training_args: TrainingArguments) -> Path | None:
    """The newest whole checkpoint of a run, `None` if there is none. Newer ones that are not whole are named."""
    checkpoint, skipped = newest_whole(output, training_args.save_only_model)
    if training_args.process_index == 0:
        for folder, fault in skipped.items():
            logger.warning("%s: is not whole and skipped (%s)", folder, fault)
        if skipped and checkpoint:
            logger.warning("%s: the run goes on from here", checkpoint)
    return checkpoint


def run_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset | TextStream,
    validation_rows: Dataset | None,
    settings: RunSettings,
    training_args: TrainingArguments,
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: Teacher | None = None,
) -> MHMoETrainer:
    """
    Train a model and save it, with its tokenizer, as soon as it is trained; then measure it, if the last evaluation
    was of other weights.

    Raises:
        UserError: Trainer cannot be used so, the model could not be saved (which is found before training), or the
            repository on the Hub cannot be made. An output folder that is empty then is removed.
    """
    output = Path(training_args.output_dir)  # ty: ignore[invalid-argument-type]: never None
    use_cache = model.config.use_cache
    in_advance = _SaveInAdvance()
    stream = train_rows if isinstance(train_rows, TextStream) else None
    if checkpoint is not None:
        resume_stream(stream, checkpoint, training_args)

    def way_out() -> str:
        whole, _ = newest_whole(output, training_args.save_only_model)
        goes_on = "--resume_from_checkpoint true goes on" if whole else "--overwrite starts anew"
        return f"mend that, then {goes_on}"

    with _removed_if_empty(output), writing(output, way_out):
        try:
            with refusals_in_one_line(training_args):
                trainer = MHMoETrainer(
                    model=model,
                    args=training_args,
                    train_dataset=train_rows,
                    eval_dataset=validation_rows,
                    data_collator=causal_batch,
                    processing_class=tokenizer,
                    compute_metrics=TokenQuality(),
                    preprocess_logits_for_metrics=token_predictions,
                    balance=settings.output_router_logits,
                    teacher=teacher,
                    callbacks=[in_advance, *callbacks],
                )
        except UserError:
            raise
        except Exception as error:
            if not training_args.push_to_hub:
                raise UserError(f"Trainer cannot be set up so ({one_line(error)})") from error
            raise UserError(f"push_to_hub: the repository cannot be made ({one_line(error)})") from error
        if stream is not None:
            trainer.add_callback(StreamCallback(stream, trainer, checkpoint))
        check_sharding(trainer, checkpoint)
        if settings.overwrite and checkpoint is None and trainer.is_world_process_zero():
            for stale in output.glob("checkpoint-*/"):
                shutil.rmtree(stale)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except UserError:
            raise
        except Exception as error:
            if in_advance.done or refusal_of(error, output):
                raise
            raise UserError(f"training cannot begin so ({one_line(error)})") from error
        model.config.use_cache = use_cache  # Trainer turns it off, and would save it so
        trainer.save_model(_internal_call=True)  # or it would push already
    if validation_rows is not None and (
        training_args.load_best_model_at_end
        or [evaluation["step"] for evaluation in measured(trainer)][-1:] != [trainer.state.global_step]
    ):
        trainer.evaluate()
    with writing(output, way_out):
        trainer.save_state()
    return trainer


def measured(trainer: MHMoETrainer) -> list[dict[str, float]]:
    """The evaluations of a run, from the first (before training) to the last, each with its `step`."""
    return [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]


def push(trainer: MHMoETrainer) -> None:
    """
    Upload what was saved, if that was asked for.

    Raises:
        UserError: that failed. What was saved is still there.
    """
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.push_to_hub()
    except Exception as error:  # of several libraries and the network
        output = trainer.args.output_dir
        raise UserError(
            f"push_to_hub: failed ({one_line(error)}); the model is in output_dir={output}, and "
            f"`hf upload {trainer.hub_model_id or 'REPOSITORY'} {output}` tries it again"
        ) from error


def copy_licenses(source: Path, output: Path) -> None:
    """Copy the licences of the model that training started from, which may be in a folder LICENSES."""
    for name in own_files(source, (*LICENSE_FILES, "LICENSES/*")):
        with surviving(f"{source / name}: was not copied"):
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, output / name)
    for path in foreign_licenses(source):
        logger.warning("%s: was not copied (it is no text of this folder)", path)


@contextmanager
def surviving(what: str) -> Generator[None]:
    """For what comes after the weights are saved: where the block fails, one line in the log says so, as `what`."""
    try:
        yield
    except Exception as error:
        logger.warning("%s (%s)", what, one_line(error))


@contextmanager
def _removed_if_empty(folder: Path) -> Generator[None]:
    """Remove what was made of the path to `folder` when the block fails and has left nothing there."""
    made = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of several processes, another may be first
            for place in made:
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()
        raise


class _SaveInAdvance(TrainerCallback):
    """
    Saves all but the weights somewhere before training begins: some configs can be loaded but not saved, which would
    otherwise be found at the first checkpoint. What fails before is about the arguments or the checkpoint to resume.
    """

    done = False

    def on_train_begin(self, args, state, control, **kwargs):
        folder = tempfile.mkdtemp()
        try:
            kwargs["model"].save_pretrained(folder, state_dict={})
            kwargs["processing_class"].save_pretrained(folder)
        except Exception as error:  # whatever it is, the trained model would meet it too
            if (refusal := refusal_of(error, Path(folder))) is not None:
                raise WriteError(refusal, "mend that, or set TMPDIR to another folder") from error
            raise UserError(
                f"the model could not be saved after training, so it is not trained: {one_line(error)}"
            ) from error
        finally:
            shutil.rmtree(folder)
        self.done = True
