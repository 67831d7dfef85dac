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
        # ty: ignore[invalid-assignment]: never None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        # ty: ignore[not-iterable]: a pair, with output_loading_info
        model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # many libraries have a part in it, each with exceptions of its own
        raise UserError(f"{source}: cannot be loaded as a causal language model ({one_line(error)})") from error
    return model, tokenizer, sorted(loading["missing_keys"])
