"""How much of a pre-training run goes into measuring it."""

from math import ceil

from transformers import TrainingArguments

from .arguments import HELD_OUT_ROWS, PretrainArguments


LEAST_TOKENS = 4096  # of an evaluation; the perplexity of fewer says little


def evaluation_rows(
    pretraining: PretrainArguments, training_args: TrainingArguments, train_rows: int, block_size: int, texts: int
) -> int:
    """
    The most rows to validate on, of all texts together.

    Where `max_eval_samples` does not say it, all evaluations of a run together read at most as many tokens as it
    trains on, which is about a quarter of its time: a token costs a third of what it costs in training. An evaluation
    has at least `LEAST_TOKENS`, though; where that is too much, there are fewer of them, if `eval_steps` is a share of
    the run (set here) and not a number of steps.

    Args:
        train_rows: of the run.
        block_size: tokens of a row.
        texts: files to validate on; without any, rows are held out of the text to train on.
    """
    if pretraining.max_eval_samples is not None:
        return pretraining.max_eval_samples
    least = ceil(LEAST_TOKENS / block_size)
    by_text = texts > 1  # at the end, each text is measured by itself
    number = _evaluations(training_args) + by_text
    affordable = max(train_rows // least - by_text, 2)
    if number - by_text > affordable and _is_share(training_args):
        training_args.eval_steps = ceil(training_args.max_steps / (affordable - 1))
        number = _evaluations(training_args) + by_text
    rows = max(train_rows // number, least)
    return rows if texts else min(rows, HELD_OUT_ROWS)


def describe_budget(training_args: TrainingArguments, rows: int, block_size: int) -> str:
    """The line of the log on a run whose evaluations are limited to `rows`."""
    return (
        f"the model is evaluated {_evaluations(training_args)} times on {rows} blocks of {block_size} tokens, so that "
        "evaluation does not take most of the time of so short a run; --max_eval_samples says otherwise"
    )


def _is_share(training_args: TrainingArguments) -> bool:
    """Whether evaluations may be moved: not where checkpoints are compared by them."""
    return (
        training_args.eval_strategy == "steps"
        and training_args.eval_steps is not None
        and training_args.eval_steps < 1
        and not training_args.load_best_model_at_end
    )


def _evaluations(training_args: TrainingArguments) -> int:
    """Before training, every so many steps, and at the end."""
    steps, every = training_args.max_steps, training_args.eval_steps
    if training_args.eval_strategy != "steps" or every is None:
        return 2
    interval = ceil(steps * every) if every < 1 else int(every)
    return 1 + ceil(steps / interval)
