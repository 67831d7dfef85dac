"""BitNet b1.58 (arXiv 2402.17764): linear layers and experts of ternary weights and 8-bit activations.

Weights are kept as they are trained and rounded in every forward; gradients pass the rounding as if it was none. To
save what the forward sees, they are packed: four to a byte, rows in the order of transformers' own BitNet checkpoints.
The norm that b1.58 has before each linear layer is that of the decoder layer: P2 adds none, and neither does this.

This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: S sub-tokens of d/h numbers, E experts, k experts per sub-token, `...` any leading dimensions.
"""

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .configuration_mhmoe import MHMoEConfig
from .experts import SubTokenExperts, WeightsView


# the experts backends whose steps between the two products are the module's own, which `BackendView` rounds
BACKENDS = ("eager", "grouped_mm", "batched_mm", "subtoken")
VALUES_PER_ITEM = 4  # ternary values of a byte, as in transformers' own BitNet


def straight_through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, to the bit, with the gradient of `values`."""
    return rounded.detach() + (values - values.detach())


def quantize_activations(activations: torch.Tensor) -> torch.Tensor:
    """Each row, so each token or sub-token, in steps of its largest absolute value / 127 (the paper's absmax)."""
    values = activations.detach().float()
    steps = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    return straight_through(activations, ((values / steps).round() * steps).to(activations.dtype))


def to_ternary(weights: torch.Tensor, stacked: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the paper's absmean makes of weights `(..., out, in)`, each matrix for itself, of which `stacked` share `out`.

    Returns:
        Signs -1, 0 and 1 `(..., out, in)` and scales `(..., stacked)`, both float32.
    """
    matrices = weights.detach().float().unflatten(-2, (stacked, -1))
    scales = matrices.abs().mean(dim=(-2, -1)).clamp(min=1e-5)
    signs = (matrices / scales[..., None, None]).round().clamp(-1, 1)
    return signs.flatten(-3, -2), scales


def from_ternary(signs: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights `(..., out, in)` of what [`to_ternary`] gives."""
    matrices = signs.to(dtype).unflatten(-2, (scales.shape[-1], -1)) * scales.to(dtype)[..., None, None]
    return matrices.flatten(-3, -2)


def quantize_weights(weights: torch.Tensor, stacked: int = 1) -> torch.Tensor:
    return straight_through(weights, from_ternary(*to_ternary(weights, stacked), weights.dtype))


def pack(signs: torch.Tensor) -> torch.Tensor:
    """Signs `(..., out, in)` in uint8 `(..., ceil(out / 4), in)`."""
    from transformers.integrations.bitnet import pack_weights  # which imports torch's compiler, and takes seconds

    return pack_weights(signs.movedim(-2, 0).clone()).movedim(0, -2).contiguous()  # a copy, which it writes to


def unpack(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """Signs `(..., rows, in)`. The library's own does it in a compiled function only, which not every machine can."""
    return (
        torch.cat([packed >> 2 * place & 3 for place in range(VALUES_PER_ITEM)], dim=-2)[..., :rows, :].to(torch.int8)
        - 1
    )


class BitLinear(nn.Linear):
    """A linear layer that sees its input in 8 bits and its weights as ternary."""

    matrices = {"weight": 1}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(quantize_activations(input), quantize_weights(self.weight), self.bias)


class BackendView(WeightsView):
    """With 8 bits between the two products."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return quantize_activations(self.experts._apply_gate(gate_up))

    def act_fn(self, up: torch.Tensor) -> torch.Tensor:
        """What a backend calls where there is no gate."""
        return quantize_activations(self.experts.act_fn(up))


class TernaryExperts(SubTokenExperts):
    """The experts of class `plain` with projections like [`BitLinear`], on each of `BACKENDS`."""

    plain: type[nn.Module]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(S, d/h), (S, k), (S, k) -> (S, d/h)."""
        view = BackendView(self, {name: self.seen(name, hidden_states.dtype) for name in self.matrices})
        return self.plain.forward(view, quantize_activations(hidden_states), top_k_index, top_k_weights)

    def seen(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return quantize_weights(getattr(self, name), self.matrices[name])


class _Packed(nn.Module):
    """Holds 2 bits a weight and cannot be trained: of each of `matrices` there are buffers `NAME` and `NAME_scale`."""

    matrices: dict[str, int]

    def pack_matrices(self, **shapes: tuple[int, ...]) -> None:
        self.rows = {name: shape[-2] for name, shape in shapes.items()}
        for name, (*leading, rows, columns) in shapes.items():
            packed = torch.zeros(*leading, -(-rows // VALUES_PER_ITEM), columns, dtype=torch.uint8)
            self.register_buffer(name, packed)
            self.register_buffer(f"{name}_scale", torch.zeros(*leading, self.matrices[name], dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        """Nothing to start from."""

    def seen(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return from_ternary(unpack(getattr(self, name), self.rows[name]), getattr(self, f"{name}_scale"), dtype)


class PackedLinear(_Packed):
    matrices = BitLinear.matrices

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pack_matrices(weight=(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(quantize_activations(hidden_states), self.seen("weight", hidden_states.dtype), self.bias)


class PackedExperts(_Packed, TernaryExperts):
    def __init__(self, config: MHMoEConfig):
        super().__init__(config)
        shapes = {name: getattr(self, name).shape for name in self.matrices}
        for name in shapes:
            delattr(self, name)
        self.pack_matrices(**shapes)


def refuse_adapters(model: nn.Module, args: tuple) -> None:
    """
    A forward pre-hook of the base model: what adds to the output of a [`BitLinear`] could never be merged into it.

    Raises:
        ValueError: an adapter does.
    """
    if torch.compiler.is_compiling():
        return
    for name, module in model.named_modules():
        # an adapter of a parameter says which
        if isinstance(getattr(module, "base_layer", None), BitLinear) and not hasattr(module, "parameter_name"):
            raise ValueError(
                f"use_bitnet=True rounds the weights of {name}, and what is merged into them: its adapter could not "
                "be. Adapt the weights before they are rounded: in PEFT, target_modules=[] and "
                f"target_parameters=['{name.rpartition('.')[2]}.weight', ...]."
            )


def use_bit_linear(layer: nn.Module, packed: bool) -> None:
    """Makes every `nn.Linear` inside `layer` a [`BitLinear`] or [`PackedLinear`]."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            if packed:
                layer.set_submodule(
                    name, PackedLinear(module.in_features, module.out_features, module.bias is not None)
                )
            else:
                module.__class__ = BitLinear  # the same parameters, seen otherwise


def packed_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model that shares with `model`, trained with `use_bitnet`, what is not ternary, and has the rest packed."""
    config = model.config
    if not config.use_bitnet or config.bitnet_packed:
        raise ValueError(
            f"use_bitnet={config.use_bitnet}, bitnet_packed={config.bitnet_packed}: only a model trained with "
            "use_bitnet=True has ternary weights to pack, and only once."
        )
    with torch.device("meta"):
        packed = type(model)(type(config).from_dict({**config.to_dict(), "bitnet_packed": True}))
    tensors = model.state_dict()
    for module_name, module in packed.named_modules():
        if isinstance(module, _Packed):
            for name, stacked in module.matrices.items():
                full_name = f"{module_name}.{name}"
                signs, scales = to_ternary(tensors[full_name], stacked)
                tensors |= {full_name: pack(signs), f"{full_name}_scale": scales}
    packed.load_state_dict(tensors, assign=True)
    packed.tie_weights()
    if model.can_generate():
        packed.generation_config = model.generation_config
    return packed
