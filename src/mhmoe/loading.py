"""Loading a model, its config or its tokenizer: whatever is wrong is one line, and no code of it runs unasked."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .encoders.families import TYPE_PREFIX as ENCODERS
from .errors import UserError, one_line
from .intake import TOKENIZER_FILES, read_json


def load_config(source: str | Path, name: str | None = None) -> PreTrainedConfig:
    """
    Args:
        source: a folder, or an id on the Hub.
        name: what the user calls it, where that is not `source`.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # many libraries have a part in it, each with exceptions of its own
        raise UserError(f"{name or source}: its config cannot be loaded ({one_line(error, 300)})") from error


def load_tokenizer(
    source: str | Path, name: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The same of a tokenizer, whose own code is run with `trust_remote_code` alone."""
    try:
        # ty: ignore[invalid-explicit-return]: never None
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json is a bare Exception
        where = f"{broken}: " if (broken := _broken_json(Path(source))) else ""
        raise UserError(
            f"{name or source}: its tokenizer cannot be loaded ({where}{one_line(error, 300)}); get its files again"
        ) from error


def _broken_json(folder: Path) -> str | None:
    """The name of a tokenizer's file that is no JSON, which its own library does not say."""
    for name in TOKENIZER_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            try:
                read_json(folder / name)
            except UserError:
                return name
    return None


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
    model_type = load_config(source).model_type
    if model_type.startswith(ENCODERS):
        raise UserError(f"{source}: a {model_type} is an encoder, and no causal language model; see docs/encoders.md")
    tokenizer = load_tokenizer(source)
    try:
        # ty: ignore[not-iterable]: a pair, with output_loading_info
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:
        raise UserError(f"{source}: cannot be loaded as a causal language model ({one_line(error, 300)})") from error
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
