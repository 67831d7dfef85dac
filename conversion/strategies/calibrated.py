"""
Strategy `calibrated`: an MH-MoE model that costs what the dense one does, from some thousand lines of text. Head and
merge layer and the routed experts are paid for with dense neurons: of ff neurons per layer the shared expert keeps

    s = ff - 2d/3 - k i,

the hottest by RMS(activation) |down column|, the next d/2 are anchored as in strategy `anchored`. The others go, those
first that are missed least when the down columns of all that are left are refitted by ridge regression. At least half
of each expert's neurons are free, that is, start random with a zero down projection. Then the whole layer is
distilled: some steps of Adam towards what the dense FFN answers. All this in layer order, on the inputs that the
converted model itself sees.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mhmoe.errors import UserError
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock
from mhmoe.options import option

from ..calibration import CALIBRATION_TOKENS, LayerByLayer, LayerWalk
from ..distillation import distil
from ..pruning import keep_best
from ..sizes import Sizes, default_num_moe_heads
from .anchored import Anchored, Split
from .strategy import FLOAT32, PROGRAM_BYTES, Promise, StrategyOptions, seeded_generator


if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tensors import DenseFFN, DenseWeights

HELD_OUT = 8  # every eighth row measures, and is not fitted to
KEEP_AS_THEY_ARE = 1e9  # a ridge that allows no change
STAGES = {
    "kept": "with the hottest neurons merely kept",
    "refitted": "after the ridge regression",
    "distilled": "after distillation",
}


@dataclass(frozen=True, kw_only=True)
class CalibratedOptions(StrategyOptions):
    """
    Attributes:
        distillation_steps: per layer; see `conversion/distillation.py`.
    """

    distillation_steps: int = option(60, "of distillation, for each layer (default: %(default)s)", "N")

    def __post_init__(self):
        if self.distillation_steps < 0:
            raise UserError(f"--distillation-steps {self.distillation_steps}: give 0 for none, or more")


@dataclass(frozen=True)
class Lesson:
    """
    What a dense FFN does with the text, which an MH-MoE layer is to learn.

    Attributes:
        targets: (B, T, d), what it answers to every token.
        weights: (B, T, 1), how much that counts.
    """

    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class LayerFit:
    """
    One fitted layer.

    Attributes:
        block: the MH-MoE layer.
        errors: of this layer, by stage, relative to what the dense FFN answers to held-out rows.
    """

    block: MHMoESparseMoeBlock
    errors: dict[str, float]


class Calibrated(Anchored):
    """
    The hottest neurons shared, the next d/2 anchored, the others' work learnt by all: see above.

    It holds three times the calibration text's hidden states, the dense and the new weights of one layer and either a
    Gram matrix of its activations with the inverse, or gradients and Adam's moments. The bytes that it writes depend
    on the machine's arithmetic. It measures each layer's relative error on every eighth row of the text, which is not
    fitted to: with the hottest neurons merely kept, after the ridge regression, and after distillation.
    """

    name = "calibrated"
    summary = "at the dense model's cost, fitted on --calibration FILE; logits near"
    promise = Promise(
        in_short="the dense model's FFN cost; perplexity within 1.6 times",
        text="the FFNs cost what the dense ones cost, within 1%; embeddings, attention and norms are the dense "
        "model's, to the bit. The logits are near the dense model's, not equal: perplexity, as `mhmoe verify` "
        "measures it, is at most 1.6 times the dense model's. `conversion.json` has each layer's error on text that "
        "was held out.",
        max_perplexity_ratio=1.6,
    )
    untrained = (
        "It says nearly what the dense model says, at the same cost: a part of the dense neurons was dropped, and the "
        "others and the experts, half of whose neurons start free, have learnt their work from a short text."
    )
    needs_text = True
    family = ()
    Options = CalibratedOptions
    options: CalibratedOptions
    defaults = {"num_moe_heads": "8", "moe_intermediate_size": "hidden_size / H"}
    ridge = 0.2  # of each activation's mean square; with 6,144 tokens 0.02 forgets much of what the text does not show

    def __init__(self, recipe: "Recipe", weights: "DenseWeights", token_ids: torch.Tensor | None = None):
        super().__init__(recipe, weights, token_ids)
        self._fits = LayerByLayer(self._fit_all)

    @staticmethod
    def default_heads(dense_config: PreTrainedConfig) -> int:
        """8 where it can be: more heads make smaller experts, and so leave room for more dense neurons."""
        fitting = (heads for heads in (8, 6) if dense_config.hidden_size % (2 * heads) == 0)
        return next(fitting, None) or default_num_moe_heads(dense_config)

    @staticmethod
    def default_inner_size(dense_config: PreTrainedConfig, num_moe_heads: int) -> int:
        """Twice what the anchored neurons need, so that half of each expert is free."""
        return max(dense_config.hidden_size // num_moe_heads, 1)

    @classmethod
    def shared_width(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> int:
        routed = sizes.num_experts_per_tok * sizes.moe_intermediate_size
        width = dense_config.intermediate_size - round(2 * dense_config.hidden_size / 3) - routed
        if width < 1:
            raise UserError(
                f"--moe-intermediate-size {sizes.moe_intermediate_size} with --num-experts-per-tok "
                f"{sizes.num_experts_per_tok} leaves strategy {cls.name} no shared expert at the dense "
                "model's cost; give smaller or fewer experts, or more --num-moe-heads"
            )
        return cls.needs_width(width, sizes)

    @classmethod
    def match_dense(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> Sizes:
        """`sizes` as they are: whatever they are, the shared expert gets what makes the cost the dense model's."""
        return sizes

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        super().check(recipe)
        least = recipe.config.hidden_size // recipe.config.num_moe_heads
        if recipe.config.moe_intermediate_size < least:
            raise UserError(
                f"--moe-intermediate-size {recipe.config.moe_intermediate_size} is too small for strategy {cls.name}, "
                f"which leaves half of each expert free; give at least {least}, or more --num-moe-heads"
            )

    @classmethod
    def peak_memory(cls, recipe: "Recipe", stored_itemsize: int) -> int:
        """
        Bytes, estimated: the text's hidden states and what the FFN answers to them, the embedding, and of one layer
        the dense FFN and either the Gram matrix of its neurons with what inverting it takes, or the new FFN with
        gradients and Adam's moments. All but the embedding is in float32.
        """
        config = recipe.config
        states = FLOAT32 * CALIBRATION_TOKENS * config.hidden_size
        ffn = FLOAT32 * 3 * config.hidden_size * config.intermediate_size
        gram = FLOAT32 * config.intermediate_size**2
        embedding = config.vocab_size * config.hidden_size * stored_itemsize
        return PROGRAM_BYTES + embedding + 5 * states + ffn + max(4 * gram, 5 * ffn)

    def layer(self, layer: int, ffn: "DenseFFN") -> Iterator[tuple[str, torch.Tensor]]:
        fit, _ = self._fits[layer]
        yield from fit.block.state_dict().items()

    def measured(self) -> dict:
        """Relative errors of the layers, also where a resumed conversion found all tensors written."""
        _, errors = self._fits[self.config.num_hidden_layers - 1]
        return {"held_out_relative_error": errors}

    @classmethod
    def describe(cls, figures: dict) -> str:
        layers = figures["held_out_relative_error"]
        means = {stage: sum(errors[stage] for errors in layers) / len(layers) for stage in layers[0]}
        of = (
            "Relative error of the FFNs' outputs on every eighth row of it, which nothing was fitted to, mean over the"
        )
        return "\n".join([f"{of} layers:\n", *(f"- {STAGES[stage]}: {mean:.3f}" for stage, mean in means.items())])

    @torch.no_grad()
    def _fit_all(self) -> Iterator[tuple[LayerFit, list[dict[str, float]]]]:
        """Each layer's fit, with the errors of the layers so far, on the way of the text through the fitted layers."""
        assert self.token_ids is not None  # it needs a text
        walk = LayerWalk(self.dense_config, self.token_ids, self.weights.load)
        errors = []
        for layer, ffn in enumerate(walk.layers()):
            fit = self.fit_layer(layer, ffn, walk)
            errors.append(fit.errors)
            walk.add(fit.block)
            yield fit, list(errors)

    def fit_layer(self, layer: int, ffn: LlamaMLP, walk: LayerWalk) -> LayerFit:
        """
        Fit one MH-MoE layer to the dense `ffn`, on what `walk` shows it of the text.

        Args:
            layer: which one.
            ffn: the dense FFN; its down projection becomes the refitted one.
            walk: has come to this layer.
        """
        config, errors = self.config, {}
        lesson, gram = self._observe(ffn, walk)
        if not gram.isfinite().all():
            raise UserError(
                f"layer {layer}: the dense model's numbers are not finite on the --calibration text; its config or "
                "weights cannot be right"
            )
        shared_width = config.shared_expert_intermediate_size
        dense_down = ffn.down_proj.weight
        for stage, ridge in (("kept", KEEP_AS_THEY_ARE), ("refitted", self.ridge)):
            kept, down = keep_best(gram, dense_down, shared_width + config.hidden_size // 2, ridge)
            ffn.down_proj.weight = nn.Parameter(down)
            errors[stage] = self._held_out_error(ffn, lesson, walk)
        del gram

        block = self._empty_block()
        split = Split(moving=self.dealt(kept[shared_width:]), staying=kept[:shared_width].sort().values)
        tensors = block.state_dict()
        for part, tensor in self.anchored(layer, ffn.state_dict(), split, walk.inputs()):
            tensors[part].copy_(tensor)
        if self.options.distillation_steps:
            rows = self._rows(walk, held_out=False)
            distil(
                block,
                torch.cat(list(walk.inputs(rows))),
                lesson.targets[rows].flatten(0, 1),
                lesson.weights[rows].flatten(0, 1),
                self.options.distillation_steps,
                seeded_generator(f"model.layers.{layer}.distillation", self.seed),
            )
            errors["distilled"] = self._held_out_error(block, lesson, walk)
        return LayerFit(block, errors)

    def _observe(self, ffn: LlamaMLP, walk: LayerWalk) -> tuple[Lesson, torch.Tensor]:
        """With the Gram matrix, (ff, ff), of the FFN's weighted activations on the rows that are not held out."""
        targets, weights = torch.empty_like(walk.states), torch.empty(*walk.states.shape[:2], 1)
        gram = torch.zeros(self.config.intermediate_size, self.config.intermediate_size)
        fitted_to = self._rows(walk, held_out=False)
        for row, inputs in enumerate(walk.inputs()):
            activation = ffn.act_fn(ffn.gate_proj(inputs)) * ffn.up_proj(inputs)  # (T, ff)
            targets[row] = activation @ ffn.down_proj.weight.T
            # the next norm divides by a token's size: errors count relative to it
            weights[row] = (walk.states[row] + targets[row]).square().mean(1, True).rsqrt()
            if row in fitted_to:
                weighted = activation * weights[row]
                gram.addmm_(weighted.T, weighted)
        return Lesson(targets, weights), gram

    def _held_out_error(self, layer: nn.Module, lesson: Lesson, walk: LayerWalk) -> float:
        """Of something in the dense FFN's place, relative to what that answers."""
        rows = self._rows(walk, held_out=True)
        targets, weights = lesson.targets[rows], lesson.weights[rows]
        outputs = torch.stack([layer(inputs[None])[0] for inputs in walk.inputs(rows)])
        return round((((outputs - targets) * weights).norm() / (targets * weights).norm()).item(), 4)

    @staticmethod
    def _rows(walk: LayerWalk, held_out: bool) -> list[int]:
        return [row for row in range(len(walk.states)) if (row % HELD_OUT == HELD_OUT - 1) == held_out]

    def _empty_block(self) -> MHMoESparseMoeBlock:
        config = copy.deepcopy(self.config)
        config._experts_implementation = "eager"  # the same arithmetic wherever it runs
        return MHMoESparseMoeBlock(config)
