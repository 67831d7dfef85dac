"""Experts whose weights torchao or bitsandbytes hold in fewer bits. Transformers itself quantizes linear layers alone.

A forward restores the matrices of its layer, and hands them to the experts backend.
This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: S sub-tokens of d/h numbers, E experts, k experts per sub-token.
"""

from importlib import import_module

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .experts import SubTokenExperts, WeightsView, keeping


logger = logging.get_logger(__name__)

BLOCK = 64  # weights that share a scale in 4 bits, as in bitsandbytes' linear layers


class _QuantizedExperts(SubTokenExperts):
    """The experts of class `plain` on every backend, with restored weights, which are not trained."""

    plain: type[nn.Module]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(S, d/h), (S, k), (S, k) -> (S, d/h)."""
        view = WeightsView(self, {name: self.restored(name, hidden_states.dtype) for name in self.matrices})
        return self.plain.forward(view, hidden_states, top_k_index, top_k_weights)

    def restored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One of `matrices`, as numbers."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Nothing to start from."""


class TorchAoExperts(_QuantizedExperts):
    """Parameters whose names are in `quantized` are torchao's tensors."""

    quantized: list[str]

    def restored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        weight = getattr(self, name)
        return weight.dequantize() if name in self.quantized else weight


class BitsAndBytesExperts(_QuantizedExperts):
    """
    Of each of `matrices` there are buffers `NAME` and `NAME_absmax`: in "int8" a number and, for each row of a matrix,
    the largest absolute value; in "nf4" and "fp4" half a byte a number, and the same for each block of [`BLOCK`].
    """

    def hold(self, kind: str) -> None:
        """Makes buffers of the parameters, whose numbers are taken unless they are on the meta device."""
        self.kind, self.shapes = kind, {name: getattr(self, name).shape for name in self.matrices}
        for name in self.matrices:
            weight = getattr(self, name).detach()
            delattr(self, name)
            stored, absmax = (_to_int8 if kind == "int8" else _to_4_bit)(weight, kind)
            self.register_buffer(name, stored)
            self.register_buffer(f"{name}_absmax", absmax)

    def restored(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored, absmax = getattr(self, name), getattr(self, f"{name}_absmax")
        if self.kind == "int8":
            return stored.to(dtype) * (absmax / 127).to(dtype)
        functional = import_module("bitsandbytes.functional")
        count = self.shapes[name].numel()
        state = functional.QuantState(
            absmax,
            # in one row: on a CPU, bitsandbytes restores rows wrongly that are not of whole blocks
            shape=torch.Size([count + count % 2]),
            code=functional.get_4bit_type(self.kind, device=stored.device),
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=dtype,
        )
        return functional.dequantize_4bit(stored, state).flatten()[:count].view(self.shapes[name])


def _to_int8(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = weight.float().abs().amax(dim=-1, keepdim=True)
    steps = absmax.clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / steps).round().to(torch.int8), absmax


def _to_4_bit(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    weights = pad(weight.flatten(), (0, weight.numel() % 2))  # two in a byte
    if weight.device.type == "meta":
        stored = torch.empty(len(weights) // 2, 1, dtype=torch.uint8, device="meta")
        return stored, torch.empty(-(-len(weights) // BLOCK), dtype=torch.float32, device="meta")
    stored, state = import_module("bitsandbytes.functional").quantize_4bit(weights, blocksize=BLOCK, quant_type=kind)
    return stored, state.absmax


def is_torchao(weight: torch.Tensor) -> bool:
    return type(weight).dequantize is not torch.Tensor.dequantize


def use_bitsandbytes(experts: SubTokenExperts, kind: str) -> None:
    """Makes `experts` hold their matrices as `kind`: "int8", "nf4" or "fp4"."""
    experts.__class__ = keeping(BitsAndBytesExperts, type(experts))
    assert isinstance(experts, BitsAndBytesExperts)
    experts.hold(kind)


def quantize_experts(model: PreTrainedModel) -> None:
    """
    What is left to do when `from_pretrained` has quantized the linear layers of `model`: the same to the experts, or a
    warning of one line that they stay as they are.

    Raises:
        ValueError: BitNet's weights, which are ternary, are to be quantized once more.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    config = quantizer.quantization_config
    method = str(getattr(config.quant_method, "value", config.quant_method))
    if model.config.use_bitnet:
        raise ValueError(
            f"use_bitnet=True and quantization_config of {method}: BitNet's weights are ternary, and would be rounded "
            "twice; `save_packed` holds them in 2 bits."
        )
    skipped = getattr(quantizer, "modules_to_not_convert", None)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, SubTokenExperts) and should_convert_module(name, skipped)
    ]
    reason = "it takes linear layers alone"
    if method == "bitsandbytes":
        kind = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
        for experts in layers:
            if not isinstance(experts, BitsAndBytesExperts):
                use_bitsandbytes(experts, kind)
        model.config.experts_quantization = kind if layers else None
        _warn_of_parts_of_blocks(model, kind)
    elif method == "torchao":
        reason = _use_torchao(layers, config.quant_type, quantizer.pre_quantized)
    plain = [experts for experts in layers if not isinstance(experts, _QuantizedExperts)]
    if len(plain) < len(layers):
        model.register_forward_pre_hook(refuse_adapters)
    plain = [experts for experts in plain if all(name in experts._parameters for name in experts.matrices)]
    if plain:
        dtype = str(next(plain[0].parameters()).dtype).removeprefix("torch.")
        logger.warning(
            f"quantization_config of {method}: {reason}, so the experts of {len(plain)} layers stay in {dtype}; "
            "bitsandbytes (4 and 8 bits) and torchao (int8) take them too."
        )


def dequantize_experts(model: PreTrainedModel) -> None:
    """The way back from bitsandbytes', to parameters in the dtype of `model`, for `model.dequantize()`."""
    for experts in model.modules():
        if isinstance(experts, BitsAndBytesExperts):
            for name in experts.matrices:
                restored = experts.restored(name, model.dtype)
                del experts._buffers[name], experts._buffers[f"{name}_absmax"]
                experts.register_parameter(name, nn.Parameter(restored))
            experts.__class__ = experts.plain
    model.config.experts_quantization = None


def _warn_of_parts_of_blocks(model: PreTrainedModel, kind: str) -> None:
    """bitsandbytes fails on a CPU where the rows of a linear layer in 4 bits are no whole blocks."""
    if kind == "int8" or model.device.type != "cpu":
        return
    linear = import_module("bitsandbytes.nn").Linear4bit
    names = {
        ".".join(name.split(".")[-2:])
        for name, module in model.named_modules()
        if isinstance(module, linear) and module.in_features % BLOCK
    }
    if names:
        logger.warning(
            f"{', '.join(sorted(names))}: in_features is no multiple of {BLOCK}, as bitsandbytes needs it in 4 bits "
            f"on a CPU; add to llm_int8_skip_modules: {sorted(names)}."
        )


def refuse_adapters(model: nn.Module, args: tuple) -> None:
    """
    A forward pre-hook: PEFT's `target_parameters` cannot add to quantized matrices, nor `modules_to_save` train them.

    Raises:
        ValueError: an adapter would.
    """
    for name, module in model.named_modules():
        if hasattr(module, "modules_to_save") and isinstance(
            getattr(module, "original_module", None), _QuantizedExperts
        ):
            raise ValueError(
                f"modules_to_save has {name}, which is quantized and cannot be trained; leave it out, or leave "
                "experts unquantized (llm_int8_skip_modules or modules_to_not_convert: ['experts'])."
            )
        if hasattr(module, "parameter_name") and isinstance(module.get_base_layer(), _QuantizedExperts):
            raise ValueError(
                f"target_parameters has {name.partition('.base_layer')[0]}.{module.parameter_name}, which is "
                "quantized and cannot be adapted; adapt linear layers (target_modules), or leave experts unquantized "
                "(llm_int8_skip_modules or modules_to_not_convert: ['experts'])."
            )


def _use_torchao(layers: list[SubTokenExperts], quant_type, pre_quantized: bool) -> str:
    """Quantizes experts that are not yet; why some are not, if they are not."""
    torchao = import_module("torchao.quantization")
    if pre_quantized:
        reason = "the folder holds them unquantized"
    elif isinstance(quant_type, torchao.FqnToConfig):
        reason = r"no rule of FqnToConfig is theirs, as 're:.*\.experts\.\w+_proj' would be"
    else:
        reason = ""
    for experts in layers:
        weights = [getattr(experts, matrix) for matrix in experts.matrices]
        if not (pre_quantized or any(map(is_torchao, weights)) or isinstance(quant_type, torchao.FqnToConfig)):
            each = torchao.FqnToConfig(dict.fromkeys(experts.matrices, quant_type))
            try:
                torchao.quantize_(experts, each, filter_fn=None)
                if not all(getattr(experts, matrix).dequantize().isfinite().all() for matrix in experts.matrices):
                    raise ValueError("it makes NaN of them, as torchao's float8 does of a row of zeros")
            except Exception as error:  # of many kinds: a config's limits are torchao's to know
                for matrix, weight in zip(experts.matrices, weights, strict=True):
                    setattr(experts, matrix, weight)  # not one without the other
                reason = f"{type(quant_type).__name__} does not take them ({' '.join(str(error).split())})"
        quantized = [matrix for matrix in experts.matrices if is_torchao(getattr(experts, matrix))]
        if quantized:
            experts.__class__ = keeping(TorchAoExperts, type(experts))
            assert isinstance(experts, TorchAoExperts)
            experts.quantized = quantized
    return reason
