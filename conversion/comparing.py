"""What comparing a dense model with its converted one takes, whatever kind of model they are."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from mhmoe.errors import UserError, one_line


CACHE_LINE = 64  # bytes; torch's own tensors begin at multiples of it
CHARACTERS = 64  # of a token at most, on average


class VerificationError(UserError):
    """A converted checkpoint misses what its strategy promises."""


def read_text(text: Path, max_tokens: int) -> str:
    """
    The text to compare on; of a longer one as much as `max_tokens` tokens can be.

    Raises:
        UserError: it cannot be read, or too little of it is asked for.
    """
    if max_tokens < 4:
        raise UserError(f"max_tokens={max_tokens} is too few to compare; give at least 4")
    try:
        with text.open(encoding="utf-8") as stream:
            return stream.read(CHARACTERS * max_tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{text}: cannot be read as text ({one_line(error)}); give another --text") from error


def load_checked(model_class: type[Any], folder: Path, dtype: str) -> PreTrainedModel:
    """
    A model, in evaluation mode.

    Raises:
        UserError: it cannot be loaded.
        VerificationError: tensors are missing, or are others.
    """
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # many libraries have a part in it, each with exceptions of its own
        raise UserError(f"{folder}: cannot be loaded ({one_line(error, 300)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise VerificationError(f"{folder}: {problem.replace('_', ' ')}, such as {min(map(str, info[problem]))}")
    for parameter in model.parameters():
        # On some processors, where a tensor of a file begins in memory decides how a product with it is summed.
        if parameter.data_ptr() % CACHE_LINE:
            parameter.data = parameter.data.clone()
    # neither what the source's makers would generate with nor the form of outputs is compared
    model.generation_config, model.config.return_dict = GenerationConfig(), True
    return model.eval()


def digest(tensor: torch.Tensor) -> bytes:
    """Of its bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).digest()


def max_difference(dense: torch.Tensor, mhmoe: torch.Tensor) -> float:
    """The largest of any number; 0 where all bits are equal."""
    if torch.equal(dense, mhmoe):
        return 0.0
    return (dense.double() - mhmoe.double()).abs().max().item()
