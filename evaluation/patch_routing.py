"""Which experts the patches of a picture reach, drawn over it, as in P1's figure 1b (arXiv 2404.15045)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .routing import RoutingRecorder, by_token, different_experts


class PatchRouting:
    """
    The routing of one picture's patches in one layer of an encoder. Tokens that are no patches are left out: those for
    the class and for detections, and registers.

    Args:
        model: an encoder that reads pictures, or one with a head; of a model with several encoders, that of pictures.
        pixel_values: (1, channels, height, width), as the model's image processor gives them.
        layer: which of the layers with experts, from the first; by default the last.

    Attributes:
        layer: its index in the model.
        num_experts: E.
        chosen: (rows, columns, h, k), int64; the experts of every sub-token, the one with the largest weight first.

    Raises:
        ValueError: the model has no such layer, or its tokens are not this picture's patches in their order.
    """

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor, layer: int = -1):
        config: Any = getattr(model, "config", None)
        heads, patch = getattr(config, "num_moe_heads", None), getattr(config, "patch_size", None)
        if heads is None or patch is None or hasattr(config, "max_image_length"):  # ViLT's patches are in any order
            kind = getattr(config, "model_type", type(model).__name__)
            raise ValueError(
                f"model: a {kind} has no patches of a picture that can be drawn; give an encoder of them."
            )
        with RoutingRecorder(model) as recorder, torch.no_grad():
            model(pixel_values=pixel_values)
            chosen = recorder.chosen
        if not -len(chosen) <= layer < len(chosen):
            raise ValueError(f"layer={layer}: there are {len(chosen)} with experts, counted from 0.")
        height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
        rows, columns = pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
        choices = chosen[layer].cpu()  # (T * h, k)
        tokens = len(choices) // heads
        first = tokens - rows * columns - getattr(config, "num_detection_tokens", 0)
        if first < 0:
            raise ValueError(f"pixel_values: gives {tokens} tokens, and not {rows} x {columns} patches of {patch}.")
        patches = choices.view(tokens, heads, -1)[first : first + rows * columns]
        self.chosen = patches.reshape(rows, columns, heads, -1)
        self.layer = recorder.layers[layer]
        self.num_experts: int = config.num_routed_experts

    @property
    def reached(self) -> torch.Tensor:
        """(rows, columns), int64: how many different experts a patch's sub-tokens reach, from 1 to h * k."""
        rows, columns, heads, _ = self.chosen.shape
        return different_experts(by_token(self.chosen.flatten(0, 2), heads)).view(rows, columns)


def save_patch_figure(routing: PatchRouting, picture: torch.Tensor, file: str | Path) -> None:
    """
    Draw over a picture how many different experts each patch reaches, and for every head the expert that has the
    largest weight for it.

    Args:
        routing: of this picture.
        picture: (height, width, 3), from 0 to 1, to draw on.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    heads, top_k = routing.chosen.shape[2:]
    panels = 2 + heads
    across = min(panels, 3)
    figure = Figure(figsize=(3.2 * across, 3.1 * -(-panels // across)), layout="constrained")
    axes = figure.subplots(-(-panels // across), across, squeeze=False).flatten()
    height, width = picture.shape[:2]
    for place in axes:
        place.axis("off")
    for place in axes[:panels]:
        place.imshow(picture.numpy(), extent=(0, width, height, 0))
    axes[0].set_title("picture", fontsize="medium")
    over = {"extent": (0, width, height, 0), "alpha": 0.65, "interpolation": "nearest"}
    reached = axes[1].imshow(routing.reached.numpy(), vmin=1, vmax=heads * top_k, cmap="viridis", **over)
    axes[1].set_title(f"different experts, layer {routing.layer}", fontsize="medium")
    figure.colorbar(reached, ax=axes[1], shrink=0.8)
    for head in range(heads):
        place = axes[2 + head]
        first = place.imshow(
            routing.chosen[:, :, head, 0].numpy(), vmin=-0.5, vmax=routing.num_experts - 0.5, cmap="turbo", **over
        )
        place.set_title(f"first expert of head {head}", fontsize="medium")
    figure.colorbar(first, ax=list(axes[2:panels]), label="expert", shrink=0.8)
    figure.savefig(file, dpi=150, format="png")
