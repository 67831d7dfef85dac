"""Loading a causal language model with its tokenizer, so that whatever is wrong with it is one line."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import UserError, one_line


def load_causal_lm(source: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """
    Model, tokenizer, and the names of tensors that were not there, and so are random.

    Args:
        source: a folder, or an id on the Hub.
        options: of `from_pretrained`, where they are not `None`: dtype, attn_implementation and the like.

    Raises:
        UserError: one of them cannot be loaded.
    """
    options = {name: value for name, value in options.items() if value is not None}
    try:
        AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # many libraries have a part in it, each with exceptions of its own
        raise UserError(f"{source}: cannot be loaded as a causal language model ({one_line(error)})") from error
    model.config.return_dict = True  # transformers' own models fail to give tuples where their config asks for them
    return model, tokenizer, sorted(loading["missing_keys"])


def token_ids_of(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """
    The token ids of a text, or of several, in lists or as `return_tensors` says.

    Raises:
        UserError: the tokenizer fails at it.
    """
    try:
        # verbose=False: that a text is longer than the model's context is no matter here
        return tokenizer(text, verbose=False, **options)["input_ids"]
    except Exception as error:  # of settings in its files, or it has no token for a part of the text
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer fails at the text ({one_line(error)})") from error
