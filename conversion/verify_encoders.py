"""Does a converted encoder keep what its strategy promises? Measured on the reloaded folders."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from mhmoe.encoders.modeling_mhmoe_encoders import model_class
from mhmoe.errors import SHOWN, UserError, one_line
from mhmoe.intake import read_json
from mhmoe.loading import load_tokenizer, token_ids_of

from .checkpoint import TOKENIZER_ITSELF, DenseCheckpoint
from .comparing import digest, load_checked, max_difference, read_text
from .encoders import FFN_TENSOR
from .strategies import STRATEGIES


ROWS = 2  # sequences and pictures
LONGEST = 128  # tokens of a row


@dataclass(frozen=True)
class EncoderVerification:
    """
    What was measured. Differences are the largest over all outputs: logits, states, similarities.

    Attributes:
        strategy: of the conversion.
        dtype: in which both models ran.
        tokens, pictures: how many the models read; the text is in rows, of which one is half padding.
        max_difference: of any output.
        changed_tensors: names of tensors besides the FFNs that are not the dense model's.
    """

    strategy: str
    dtype: str
    tokens: int
    pictures: int
    max_difference: float
    changed_tensors: tuple[str, ...]

    @property
    def broken_promises(self) -> list[str]:
        """What the strategy promises and the figures do not show."""
        bound = STRATEGIES[self.strategy].promise.max_logit_difference
        broken = []
        # written so that a NaN breaks the promise
        if bound is not None and (bound == 0 or self.dtype == "float32") and not self.max_difference <= bound:
            broken.append(f"max |difference of outputs| is {self.max_difference:.3g}, not {bound:g}")
        if self.changed_tensors:
            broken.append(f"{self.changed_tensors[0]} is not the dense model's ({len(self.changed_tensors)} in all)")
        return broken

    def table(self) -> str:
        """The figures, for people."""
        changed = f"{len(self.changed_tensors)} differ" if self.changed_tensors else "equal"
        rows = [
            (f"{self.dtype}, strategy {self.strategy}", "MH-MoE against dense"),
            ("read", f"{self.tokens} tokens, {self.pictures} pictures"),
            ("tensors besides the FFNs", changed),
            ("max |difference of outputs|", f"{self.max_difference:g}"),
        ]
        return "\n".join(f"{name:<30}{value:>28}" for name, value in rows)


def verify_encoder(
    checkpoint: DenseCheckpoint, output: Path, strategy: str, text: Path, dtype: str, max_tokens: int
) -> EncoderVerification:
    """
    As [`verify`] compares decoders: what both models say of the same text and of the same pictures, which are noise.

    Raises:
        UserError: a folder or the text cannot be read, or the models need other inputs.
        VerificationError: `output` lacks tensors, or holds others.
    """
    name = (read_json(output / "config.json").get("architectures") or ["?"])[0]
    try:
        twin = model_class(name if isinstance(name, str) else "?")
    except AttributeError as error:
        raise UserError(f"{output / 'config.json'}: architectures={one_line(name)} is no encoder of mhmoe") from error
    inputs = _inputs(twin.dense, checkpoint, text, max_tokens)
    measured, digests = [], []
    for kind, folder in tqdm(((twin.dense, checkpoint.folder), (twin, output)), desc="Verifying", unit="model"):
        model = load_checked(kind, folder, dtype)
        measured.append(_outputs(model, inputs))
        tensors = model.state_dict().items()
        digests.append({key: digest(t) for key, t in tensors if not FFN_TENSOR.search(key) and ".moe." not in key})
        del model
    dense, mhmoe_ = measured
    if len(dense) != len(mhmoe_):
        raise UserError(f"{output}: has {len(mhmoe_)} outputs, and the dense model {len(dense)}")
    return EncoderVerification(
        strategy=strategy,
        dtype=dtype,
        tokens=int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0,
        pictures=ROWS if "pixel_values" in inputs else 0,
        max_difference=max(max_difference(one, other) for one, other in zip(dense, mhmoe_, strict=True)),
        changed_tensors=tuple(key for key, digest in digests[1].items() if digests[0].get(key) != digest),
    )


def _inputs(
    dense: type[PreTrainedModel], checkpoint: DenseCheckpoint, text: Path, max_tokens: int
) -> dict[str, torch.Tensor]:
    """What the model reads of a text and of pictures of noise, as far as it reads any."""
    arguments, config = inspect.signature(dense.forward).parameters, checkpoint.config
    inputs = {}
    if "input_ids" in arguments:
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        inputs |= _tokens(checkpoint, text_config, text, max_tokens, masked="attention_mask" in arguments)
    towers = [getattr(config, name) for name in ("vision_config", "image_config") if hasattr(config, name)]
    vision = towers[0] if towers else config
    if "spatial_shapes" in arguments:
        inputs |= _patches(vision)
    elif "pixel_values" in arguments:
        sides = _sides(vision.image_size)
        several = [config.num_images] if getattr(config, "num_images", -1) > 0 and "Images" in dense.__name__ else []
        generator = torch.Generator().manual_seed(0)
        inputs["pixel_values"] = torch.randn(ROWS, *several, vision.num_channels, *sides, generator=generator)
    return inputs


def _sides(size: int | list[int] | tuple[int, ...]) -> list[int]:
    """Height and width, of what configs also name by one number."""
    return list(size) if isinstance(size, list | tuple) else [size] * 2


def _patches(config: Any) -> dict[str, torch.Tensor]:
    """Noise for SigLIP2, which reads patches of pictures of any shape, filled up to one number; so one is padded."""
    side, channels = math.isqrt(config.num_patches), config.num_channels
    shapes = torch.tensor([[side, side], [side, max(side - 1, 1)]])
    pixels = channels * math.prod(_sides(config.patch_size))
    return {
        "pixel_values": torch.randn(ROWS, config.num_patches, pixels, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": (torch.arange(config.num_patches) < shapes.prod(dim=1)[:, None]).long(),
        "spatial_shapes": shapes,
    }


def _tokens(
    checkpoint: DenseCheckpoint, config: PreTrainedConfig, text: Path, max_tokens: int, masked: bool
) -> dict[str, torch.Tensor]:
    width = min(LONGEST, config.max_position_embeddings // 2, max(max_tokens // ROWS, 4))
    content = read_text(text, max_tokens)
    if checkpoint.files((*TOKENIZER_ITSELF, "vocab.txt")):
        ids = token_ids_of(load_tokenizer(checkpoint.folder), content, truncation=True, max_length=ROWS * width)
        ids = torch.tensor(ids)
    else:
        tqdm.write(f"{checkpoint.folder} has no tokenizer: comparing on random tokens")
        ids = torch.randint(config.vocab_size, (ROWS * width,), generator=torch.Generator().manual_seed(0))
    width = len(ids) // ROWS
    if width < 4:
        raise UserError(f"{text}: only {len(ids)} tokens; give a longer --text")
    ids = ids[: ROWS * width].view(ROWS, width)
    if not masked:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, width // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def _outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors of floating-point numbers that the model says."""
    moved = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    torch.manual_seed(0)  # ViLT draws among patches
    try:
        outputs = model(**moved)
    except Exception as error:  # whatever a model that reads something else raises
        raise UserError(
            f"{type(model).__name__}: does not run on a text and pictures alone ({one_line(error, SHOWN)}); compare "
            "it yourself"
        ) from error
    return list(_tensors(outputs))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
