"""
The arguments of `mhmoe train` and `mhmoe pretrain`. Each of them is composed of dataclasses that share no field. In
the help, each of these is a group under its title, before the arguments of transformers' Trainer.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar

from transformers import HfArgumentParser, TrainingArguments

from mhmoe.errors import UserError, one_line
from mhmoe.options import OptionParser


Dtype = Literal["float32", "bfloat16", "auto"]
Composed = TypeVar("Composed")

HELD_OUT_ROWS = 128
BUFFER_SIZE = 1000


@dataclass
class FineTuningText:
    """The text to fine-tune on."""

    _argument_group_name = "text"

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt (one document), .json or .jsonl (one in each row), also compressed. "
            "Several files follow each other."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Text that perplexity and token accuracy are measured on; as train_file."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Take only the first so many blocks to train on."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Take only the first so many blocks to measure on."}
    )

    def __post_init__(self):
        if isinstance(self.train_file, str):
            self.train_file = [self.train_file]


@dataclass
class PretrainingText:
    """The text to pre-train on, and how much of it."""

    _argument_group_name = "text"

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt (one document), .json or .jsonl (one in each row), also compressed. Of "
            "several files each gets an equal share of the tokens, whatever its size."
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text that perplexity is measured on, as train_file. Default: the first blocks of train_file, "
            "which then are not trained on."
        },
    )
    num_train_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens to train on, rounded down to whole steps; in place of Trainer's max_steps."},
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Blocks to measure perplexity on, spread evenly over validation_file (default: all of it), or "
            f"kept from train_file (default: {HELD_OUT_ROWS}). By default fewer, and fewer evaluations where "
            "eval_steps is a share, if the run is so short that all evaluations would read more tokens than it trains "
            "on."
        },
    )
    document_characters: int | None = field(
        default=None,
        metadata={
            "help": "Cut the documents to train on into pieces of so many characters, shuffled: a short run then sees "
            "something of every book, and not the first few books."
        },
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])


@dataclass
class NewModel:
    """A model with random weights, and its tokenizer."""

    _argument_group_name = "model"

    preset: str | None = field(
        default=None, metadata={"help": "A model of the papers' tables, such as p2-mhmoe-head3; see mhmoe params."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "In place of preset, a folder with a config.json, or an id on the Hub."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of the config, as hidden_size=192,num_hidden_layers=4; a preset's inner sizes are solved "
            "again for another hidden_size."
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder with a tokenizer, or its Hub id."})
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "In place of tokenizer_name: train a byte-level BPE of so many tokens on the text."},
    )


@dataclass
class TextReading:
    """What holds for any text."""

    _argument_group_name = "how the text is read"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "In place of train_file, a data set on the Hub: its splits `train` and `validation`."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of dataset_name."})
    text_column: str = field(
        default="text", metadata={"help": "The field or column that holds the text; others are not looked at."}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Documents are put one after the other and cut to blocks of so many tokens; the last, incomplete "
            "one is dropped. Default: 1024, or max_position_embeddings if that is less."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the text to train on while it is trained on, without a copy on disk, so that it may be "
            "larger than memory; it begins again when it ends. Needs max_steps, or num_train_tokens of mhmoe pretrain."
        },
    )
    shuffle_buffer_size: int | None = field(
        default=None,
        metadata={
            "help": f"With streaming: blocks that are in memory to be shuffled, by data_seed. Default: {BUFFER_SIZE}; "
            "1 keeps their order."
        },
    )


@dataclass
class RunSettings:
    """How the model is held in memory, and what a run does beside what Trainer's arguments say."""

    _argument_group_name = "the run"

    dtype: Dtype = field(
        default="float32",
        metadata={
            "help": "Of the weights while training and when saved; auto: as the model or its config has it. See also "
            "--bf16."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flex_attention, ..."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "subtoken, grouped_mm, batched_mm or eager."}
    )
    output_router_logits: bool = field(
        default=True, metadata={"help": "Train with the load balancing loss, weighted by the model's own coefficient."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start anew in an output_dir that is not empty: its checkpoints are removed, files replaced."
        },
    )

    def loading(self) -> dict[str, Any]:
        """What transformers' Auto classes are to know, as far as it was given."""
        options = {name: getattr(self, name) for name in ("dtype", "attn_implementation", "experts_implementation")}
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class Sharding:
    """How launched processes share out a model that is loaded."""

    _argument_group_name = "several processes"

    distributed_config: str | None = field(
        default=None,
        metadata={
            "help": "How the launched processes share out the model: the fields of transformers' DistributedConfig, "
            'as JSON or in a JSON file. {"fsdp_size": 2} is FSDP2, tp_size tensor, ep_size expert parallelism.'
        },
    )


@dataclass
class Distillation:
    """Another model to learn from."""

    _argument_group_name = "distillation"

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model whose logits are learned beside the text: folder, or id on the Hub, with the same "
            "tokenizer. For a converted model, the dense one that it came from."
        },
    )
    distillation_weight: float = field(
        default=0.5,
        metadata={"help": "Weight w of the teacher: the loss is (1 - w) * cross entropy + w * T^2 * KL divergence."},
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "T, which both models' logits are divided by in the KL divergence."}
    )
    teacher_dtype: Dtype = field(default="bfloat16", metadata={"help": "Of the teacher's weights."})


@dataclass
class Narrowing:
    """Shared experts that lose neurons while the model is trained."""

    _argument_group_name = "narrower shared experts"

    shared_expert_intermediate_size: int | None = field(
        default=None,
        metadata={
            "help": "Drop neurons of the shared experts until so many are left; those that matter least go first. "
            "mhmoe plan shows, in the column of calibrated, how many cost what the dense model does."
        },
    )
    narrowing_share: float = field(
        default=0.5, metadata={"help": "Share of all steps after which the last neuron is dropped."}
    )


@dataclass
class TrainArguments(FineTuningText, TextReading, RunSettings, Sharding, Distillation, Narrowing):
    """All that `mhmoe train` takes besides the model and the arguments of Trainer."""


@dataclass
class PretrainArguments(NewModel, PretrainingText, TextReading, RunSettings):
    """All that `mhmoe pretrain` takes besides the arguments of Trainer."""


class TrainerParser(OptionParser, HfArgumentParser, Generic[Composed]):
    """
    Reads one of the classes above and `TrainingArguments`; every mistake is a [`UserError`].

    Args:
        arguments: [`TrainArguments`] or [`PretrainArguments`].
        prog: the command, as its help names it.
        usage: its first line; all flags would fill pages.
        description: what it does.
        instead: flags of another command, and which to give here in their place.
    """

    def __init__(
        self,
        arguments: type[Composed],
        prog: str,
        usage: str,
        description: str,
        instead: dict[str, str] | None = None,
    ):
        super().__init__(
            # ty: ignore[invalid-argument-type]: which it calls DataClassType
            [*arguments.__bases__, TrainingArguments],
            prog=prog,
            usage=usage,
            description=description,
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self._composed = arguments
        self._instead = instead or {}
        self.add_argument_group("help").add_argument("-h", "--help", action="help", help="Show this and exit.")
        self._optionals.title = "options of transformers' Trainer"
        for action in self._actions:
            if action.option_strings[:1] == [f"--no_{action.dest}"]:
                action.help = f"The opposite of --{action.dest}."

    def parse(self, arguments: Sequence[str]) -> tuple[Composed, TrainingArguments, argparse.Namespace | None]:
        """The composed arguments, Trainer's, and what was added to the parser by `add_argument`."""
        try:
            answer: Any = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except UserError:
            raise
        except Exception as error:  # of TrainingArguments, about its own fields and the files that they name
            raise UserError(one_line(error)) from error
        *parsed, unknown = answer
        for flag, value in pairwise([*" ".join(unknown).replace("=", " ").split(" "), ""]):
            if better := self._instead.get(flag.removeprefix("--").replace("-", "_")):
                raise UserError(f"{flag.removeprefix('--')}={value}: give {better} in its place")
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see {self.prog} --help")
        number = len(self._composed.__bases__)
        given = {
            item.name: getattr(group, item.name) for group in parsed[:number] for item in dataclasses.fields(group)
        }
        training_args, *others = parsed[number:]
        return self._composed(**given), training_args, others[0] if others else None

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group is self._optionals)  # which are more than a hundred
        return super().format_help()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Leaves out a default that says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)
