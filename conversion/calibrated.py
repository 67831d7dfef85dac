"""
Strategy `calibrated`: an MH-MoE model that costs what the dense one does, from some thousand lines of text. Head and
merge layer and the routed experts are paid for with dense neurons: of ff neurons per layer the shared expert keeps

    s = ff - 2d/3 - k i,

the hottest by RMS(activation) |down column|, the next d/2 are anchored as in strategy `anchored`, the coldest go. What
the lost ones did is taught to the down columns of those that are left, by one ridge regression per layer, in layer
order, on the inputs that the converted model itself sees. At least half of each expert's neurons are free, that is,
start random with a zero down projection.
"""

import torch
from transformers import PreTrainedConfig

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError

from .anchored import Anchored
from .calibration import LayerWalk
from .sizes import default_num_moe_heads
from .strategy import Dense


HELD_OUT = 8  # every eighth row measures, and is not fitted to
RIDGE = 0.2  # of each activation's mean square; with 6,144 tokens 0.02 forgets much of what the text does not show


class Calibrated(Anchored):
    """
    The hottest neurons shared, the next d/2 anchored, the others' work fitted to theirs: see above.

    It holds the calibration text's hidden states and of one layer the dense weights, the
    activations on that text and their Gram matrix. The bytes that it writes depend on the machine's arithmetic.
    """

    name = "calibrated"
    takes_calibration = True
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
        if self.calibration is None:
            raise UserError(f"strategy {self.name} needs a text: give --calibration FILE")
        if config.moe_intermediate_size < config.hidden_size // config.num_moe_heads:
            raise UserError(
                f"--moe-intermediate-size {config.moe_intermediate_size} is too small for strategy {self.name}, which "
                "leaves half of each expert free; give at least "
                f"{config.hidden_size // config.num_moe_heads}, or more --num-moe-heads"
            )

    def _split(self, ffn: str, dense: Dense) -> tuple[torch.Tensor, torch.Tensor]:
        self._calibrate(int(ffn.rsplit(".", 1)[1]), dense)
        return self._split_of[ffn]

    def _down(self, ffn: str, dense: Dense) -> torch.Tensor:
        self._calibrate(int(ffn.rsplit(".", 1)[1]), dense)
        return self._fitted

    @torch.inference_mode()
    def _calibrate(self, layer: int, dense: Dense) -> None:
        """Fit all layers up to `layer`, of which only the last one's weights are kept."""
        if self._walk is None or layer < self._layer:
            self._walk, self._layer = LayerWalk(self.dense, self.calibration, dense), -1
            self.figures = {"tokens": self.calibration.numel(), "held_out_relative_error": []}
        while self._layer < layer:
            self._layer += 1
            self._fit(self._layer)

    def _fit(self, layer: int) -> None:
        walk = self._walk
        ffn = walk.enter(layer)
        inner = self.dense.intermediate_size
        down = ffn.down_proj.weight.double()  # (d, ff)

        gram = torch.zeros(inner, inner, dtype=torch.double)
        activations, weights = [], []
        for row, states in enumerate(walk.states):
            normed = walk.norm(states)
            activations.append(ffn.act_fn(ffn.gate_proj(normed)) * ffn.up_proj(normed))  # (T, ff)
            # the next norm divides by a token's size: errors count relative to it
            weights.append((states + activations[row] @ ffn.down_proj.weight.T).square().mean(1, True).rsqrt())
            if row % HELD_OUT != HELD_OUT - 1:
                weighted = activations[row] * weights[row]
                gram += weighted.T @ weighted
        score = gram.diagonal().sqrt() * down.norm(dim=0)
        ranked = score.argsort(descending=True, stable=True)
        shared_width, moved = self.sizes["shared_expert_intermediate_size"], self.dense.hidden_size // 2
        kept = ranked[: shared_width + moved]
        left = gram[kept][:, kept]
        left.diagonal().mul_(1 + RIDGE).add_(1e-12 * left.diagonal().mean())
        lost = ranked[shared_width + moved :]
        change = torch.linalg.solve(left, gram[kept][:, lost] @ down.T[lost])  # (kept, d)
        fitted = torch.zeros_like(down)
        fitted[:, kept] = down[:, kept] + change.T
        fitted = fitted.float()
        merely_kept = torch.zeros_like(fitted)
        merely_kept[:, kept] = ffn.down_proj.weight[:, kept]

        squares = torch.zeros(3, dtype=torch.double)
        for row in range(HELD_OUT - 1, len(activations), HELD_OUT):
            activation = activations[row]
            target = activation @ ffn.down_proj.weight.T
            for number, error in enumerate(
                (activation @ merely_kept.T - target, activation @ fitted.T - target, target)
            ):
                squares[number] += (error * weights[row]).double().square().sum()
        before, after = (squares[:2] / squares[2]).sqrt().tolist()
        self.figures["held_out_relative_error"].append({"kept": round(before, 4), "fitted": round(after, 4)})

        for row, activation in enumerate(activations):
            walk.states[row] += activation @ fitted.T
        self._fitted = fitted
        self._split_of[f"model.layers.{layer}"] = (
            kept[shared_width:].view(-1, self.sizes["num_moe_heads"]).T,
            kept[:shared_width].sort().values,
        )
