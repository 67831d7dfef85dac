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
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock

from .anchored import Anchored
from .calibration import LayerWalk
from .distillation import distil
from .pruning import keep_best
from .sizes import default_num_moe_heads
from .strategy import Dense, seeded_generator


HELD_OUT = 8  # every eighth row measures, and is not fitted to
KEEP_AS_THEY_ARE = 1e9  # a ridge that allows no change


class Calibrated(Anchored):
    """
    The hottest neurons shared, the next d/2 anchored, the others' work learnt by all: see above.

    It holds three times the calibration text's hidden states, the dense and the new weights of one layer and either a
    Gram matrix of its activations with the inverse, or gradients and Adam's moments. The bytes that it writes depend
    on the machine's arithmetic. It measures each layer's relative error on every eighth row of the text, which is not
    fitted to: with the hottest neurons merely kept, after the ridge regression, and after distillation.
    """

    name = "calibrated"
    needs_calibration = True
    ridge = 0.2  # of each activation's mean square; with 6,144 tokens 0.02 forgets much of what the text does not show
    _walk: LayerWalk | None = None
    _layer = -1

    @staticmethod
    def default_heads(dense: PreTrainedConfig) -> int:
        """8 where it can be: more heads make smaller experts, and so leave room for more dense neurons."""
        return next((heads for heads in (8, 6) if dense.hidden_size % (2 * heads) == 0), default_num_moe_heads(dense))

    @staticmethod
    def default_inner_size(dense: PreTrainedConfig, num_moe_heads: int) -> int:
        """Twice what the anchored neurons need, so that half of each expert is free."""
        return max(dense.hidden_size // num_moe_heads, 1)

    def shared_width(self, asked: int | None) -> int:
        routed = self.sizes["num_experts_per_tok"] * self.sizes["moe_intermediate_size"]
        width = self.dense.intermediate_size - round(2 * self.dense.hidden_size / 3) - routed
        if width < 1:
            raise UserError(
                f"--moe-intermediate-size {self.sizes['moe_intermediate_size']} with --num-experts-per-tok "
                f"{self.sizes['num_experts_per_tok']} leaves strategy {self.name} no shared expert at the dense "
                "model's cost; give smaller or fewer experts, or more --num-moe-heads"
            )
        return self._fixed_width(width, asked)

    def check(self, config: MHMoEConfig) -> None:
        super().check(config)
        self._config = config
        if self.calibration is None:
            raise UserError(f"strategy {self.name} needs a text: give --calibration FILE")
        if config.moe_intermediate_size < config.hidden_size // config.num_moe_heads:
            raise UserError(
                f"--moe-intermediate-size {config.moe_intermediate_size} is too small for strategy {self.name}, which "
                "leaves half of each expert free; give at least "
                f"{config.hidden_size // config.num_moe_heads}, or more --num-moe-heads"
            )

    def value(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        layer, part = name.removeprefix("model.layers.").split(".mlp.")
        self._calibrate(int(layer), dense)
        return self._fitted[part]

    def measured(self, dense: Dense) -> dict:
        """Relative errors of the layers, also where a resumed conversion found all tensors written."""
        self._calibrate(self.dense.num_hidden_layers - 1, dense)
        return {"held_out_relative_error": self._errors}

    @torch.no_grad()
    def _calibrate(self, layer: int, dense: Dense) -> None:
        """Fit all layers up to `layer`, of which only the last one's tensors are kept."""
        if self._walk is None or layer < self._layer:
            self._walk, self._layer = LayerWalk(self.dense, self.calibration, dense), -1
            self._errors = []
        while self._layer < layer:
            self._layer += 1
            self._fit(self._layer, dense)

    def _fit(self, layer: int, dense: Dense) -> None:
        ffn = self._walk.enter(layer)
        gram = self._observe(ffn)
        shared_width = self.sizes["shared_expert_intermediate_size"]
        dense_down, errors = ffn.down_proj.weight, {}
        for stage, ridge in (("kept", KEEP_AS_THEY_ARE), ("refitted", self.ridge)):
            kept, down = keep_best(gram, dense_down, shared_width + self.dense.hidden_size // 2, ridge)
            ffn.down_proj.weight = torch.nn.Parameter(down)
            errors[stage] = self._held_out_error(ffn)
        del gram

        prefix = f"model.layers.{layer}"
        self._down_of = down
        self._split_of = {
            prefix: (kept[shared_width:].view(-1, self.sizes["num_moe_heads"]).T, kept[:shared_width].sort().values)
        }
        block = self._empty_block()
        self._fitted = block.state_dict()
        for part, tensor in self._fitted.items():  # in the model's order: the router may ask for the head layer
            tensor.copy_(super().value(f"{prefix}.mlp.{part}", tuple(tensor.shape), dense))
        if self.distillation_steps:
            rows = self._rows(held_out=False)
            inputs = torch.cat(list(self._walk.inputs(rows)))
            generator = seeded_generator(f"{prefix}.distillation", self.seed)
            lesson = (inputs, self._targets[rows].flatten(0, 1), self._weights[rows].flatten(0, 1))
            distil(block, *lesson, self.distillation_steps, generator)
            errors["distilled"] = self._held_out_error(block)
        self._errors.append(errors)
        for row, inputs in enumerate(self._walk.inputs()):
            self._walk.states[row] += block(inputs[None])[0]

    def _observe(self, ffn: torch.nn.Module) -> torch.Tensor:
        """
        Remember what the dense FFN answers to every token, (B, T, d), and how much that counts, (B, T, 1).

        Returns:
            (ff, ff): the Gram matrix of its weighted activations on the rows that are not held out.
        """
        states = self._walk.states
        self._targets, self._weights = torch.empty_like(states), torch.empty(*states.shape[:2], 1)
        gram = torch.zeros(self.dense.intermediate_size, self.dense.intermediate_size)
        fitted_to = self._rows(held_out=False)
        for row, inputs in enumerate(self._walk.inputs()):
            activation = ffn.act_fn(ffn.gate_proj(inputs)) * ffn.up_proj(inputs)  # (T, ff)
            self._targets[row] = activation @ ffn.down_proj.weight.T
            # the next norm divides by a token's size: errors count relative to it
            self._weights[row] = (states[row] + self._targets[row]).square().mean(1, True).rsqrt()
            if row in fitted_to:
                weighted = activation * self._weights[row]
                gram.addmm_(weighted.T, weighted)
        return gram

    def _held_out_error(self, ffn: torch.nn.Module) -> float:
        """Of something in the dense FFN's place, relative to what that answers."""
        rows = self._rows(held_out=True)
        targets, weights = self._targets[rows], self._weights[rows]
        outputs = torch.stack([ffn(inputs[None])[0] for inputs in self._walk.inputs(rows)])
        return round((((outputs - targets) * weights).norm() / (targets * weights).norm()).item(), 4)

    def _rows(self, held_out: bool) -> list[int]:
        return [row for row in range(len(self._walk.states)) if (row % HELD_OUT == HELD_OUT - 1) == held_out]

    def _down(self, ffn: str, dense: Dense) -> torch.Tensor:
        return self._down_of

    def _ffn_inputs(self, layer: int, dense: Dense) -> Iterable[torch.Tensor]:
        return self._walk.inputs()

    def _empty_block(self) -> MHMoESparseMoeBlock:
        config = copy.deepcopy(self._config)
        config._experts_implementation = "eager"  # the same arithmetic wherever it runs
        return MHMoESparseMoeBlock(config)
