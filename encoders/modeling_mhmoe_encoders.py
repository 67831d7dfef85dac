"""
Encoders with MH-MoE layers in place of their FFNs: `MHMoEViTForImageClassification`, `MHMoEBertModel`, ..., one for
every model class of the families in `families.py`, made when it is asked for. Each inherits from the dense class and
states the difference: what its layers have in addition, the routers' losses, and the code beside its weights.

Tensors of the dense model keep their names, and the family's own FFN is the shared expert. So a dense checkpoint is
also one of its twin, which lacks what the twin adds: a module `moe` in every FFN.

This file travels to the Hub: it imports only torch, transformers and its siblings.
Shapes: B pictures or sequences, T patches or tokens, d hidden size, h MoE heads, E experts.
"""

import copy
import inspect
import os
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import CompileableContextVar

from .configuration_mhmoe import MHMoEConfig
from .configuration_mhmoe_encoders import config_class, inner_size, make_class, save_code, twin_class
from .families import PREFIX, TYPE_PREFIX, Family, auto_classes, family_of, register_names, twin_of
from .layer import (
    MHMoEResidualBlock,
    MHMoESparseMoeBlock,
    by_head,
    experts_implementation,
    load_balancing_loss,
    start_weights,
    warn_if_cut_off,
    z_loss,
)


Model = PreTrainedModel if TYPE_CHECKING else object  # what MHMoEEncoder is mixed into
FFN_PAIR = ("intermediate", "output")  # of which the second adds the residual


class RoutedFFN(nn.Module):
    """An FFN that is an MH-MoE layer alone, where there is no shared expert: (B, T, d) -> (B, T, d)."""

    moe: MHMoESparseMoeBlock

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.moe(hidden_states)


def add_routed(ffn: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook of an FFN in one module, which is the shared expert of the layer in its `moe`."""
    return output + ffn.moe(args[0])


def route_beside(intermediate: Any, args: tuple, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A forward hook of the first half of an FFN: its second half also gets what is routed."""
    return output, intermediate.moe(args[0])


def add_beside(output: nn.Module, args: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple:
    """A forward pre-hook of the second half, which adds the residual: what is routed is added to that."""
    (inner, routed), residual = args
    return inner, residual + routed


def add_block(layer: Any, config: Any, block: MHMoESparseMoeBlock) -> None:
    """Make `block`, and as much of the family's own FFN as `config` keeps, the FFN of a layer."""
    shared, parts = config.shared_expert_intermediate_size, ("mlp",) if hasattr(layer, "mlp") else FFN_PAIR
    if shared not in (0, inner_size(config)):
        config = copy.deepcopy(config)
        config.intermediate_size = shared
        for part in parts:
            setattr(layer, part, type(getattr(layer, part))(config))
    if not shared:
        setattr(layer, parts[0], RoutedFFN())
    getattr(layer, parts[0]).moe = block
    if parts == FFN_PAIR and not shared:
        layer.output.dense = nn.Identity()  # what it gets is routed already
    elif parts == FFN_PAIR:
        layer.intermediate.register_forward_hook(route_beside)
        layer.output.register_forward_pre_hook(add_beside)
    elif shared:
        layer.mlp.register_forward_hook(add_routed)


def stacks_of(model: "MHMoEEncoder") -> Iterator[tuple[nn.ModuleList, Any]]:
    """The lists of layers in a model, one for each encoder, and that encoder's config."""
    classes = model.family.layer, model.family.picture_layer

    def search(module: nn.Module, config: Any) -> Iterator[tuple[nn.ModuleList, Any]]:
        own = getattr(module, "config", None)
        config = own if hasattr(own, "moe_config") else config
        for child in module.children():
            if isinstance(child, nn.ModuleList) and all(type(layer).__name__ in classes for layer in child):
                yield child, config
            else:
                yield from search(child, config)

    yield from search(model, model.config)


class RouterLogits:
    """
    What the routers of a model say in one forward.

    Attributes:
        rows: for every layer that is passed: its encoder's number, logits (B * T * h, E), and what says which tokens
            are padding, (B, T), or `None`.
        mask: where the model itself makes that, the last that it made.
    """

    def __init__(self):
        self.rows: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        self.mask: torch.Tensor | None = None


# as transformers records hidden states: apart in every thread, known to torch.compile, and in a dictionary by a name
NAME = "mhmoe_router_logits"
recording = CompileableContextVar(NAME)


def recorded_now() -> RouterLogits | None:
    return (recording.get() or {}).get(NAME)


def record_logits(router: Any, args: tuple, output: tuple) -> None:
    """A forward hook of every router."""
    if (recorded := recorded_now()) is not None:
        recorded.rows.append((router.stack, output[0], recorded.mask))


def record_mask(embeddings: nn.Module, args: tuple, output: tuple) -> None:
    """A forward hook of what makes the mask."""
    if (recorded := recorded_now()) is not None:
        recorded.mask = output[1]


class MHMoEEncoder(Model):
    """
    What the model classes of all families have, beside what they inherit.

    Attributes:
        dense: the class of transformers that a class is the twin of.
        family: that it is of.
        arguments: the names of its forward's arguments, in order.
        moe_configs: of each of the model's encoders.
        moe_blocks: the MH-MoE layers.
    """

    dense: Any
    family: Family
    arguments: list[str]

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        backend = config._experts_implementation
        config._experts_implementation = "eager"  # the parts are dense models, which refuse most others
        super().__init__(config, *args, **kwargs)
        config._experts_implementation = self.get_correct_experts_implementation(backend)
        self.moe_configs: list[MHMoEConfig] = []
        self.moe_blocks: list[MHMoESparseMoeBlock] = []
        self.merge_layers_seen = False
        self.read_text: list[bool] = []  # of each encoder: whether the text's mask is of its tokens
        for stack, stack_config in stacks_of(self):
            self._add_blocks(stack, stack_config)
        for module in self.modules():
            if type(module).__name__ == self.family.mask_from:
                module.register_forward_hook(record_mask)
        self.register_forward_pre_hook(warn_if_cut_off)
        self.post_init()

    def _add_blocks(self, stack: nn.ModuleList, config: Any) -> None:
        moe_config = config.moe_config
        routed = copy.copy(moe_config)
        routed.shared_expert_intermediate_size = 0  # the family's own FFN is that
        for index in moe_config.moe_layers:
            block = (MHMoEResidualBlock if config.sub_token_residual else MHMoESparseMoeBlock)(routed)
            # ty: ignore[invalid-assignment]: torch's stub knows submodules and tensors alone
            block.experts.config = self.config  # where transformers keeps the experts' backend
            block.gate.stack = len(self.moe_configs)  # ty: ignore[invalid-assignment]: as above
            block.gate.register_forward_hook(record_logits)
            for module in block.modules():
                module.start_std = moe_config.initializer_range
            add_block(stack[index], config, block)
            self.moe_blocks.append(block)
        self.moe_configs.append(moe_config)
        self.read_text.append(not hasattr(config, "patch_size"))

    @torch.no_grad()
    def initialize_weights(self):
        """As in transformers; the layers' own parts first, since the model that holds them may be of a dense class."""
        for module in self.modules():
            std = getattr(module, "start_std", None)
            if std is not None and not getattr(module, "_is_hf_initialized", False):
                if isinstance(module, nn.Linear | nn.Conv1d):
                    init.normal_(module.weight, mean=0.0, std=std)
                    if module.bias is not None:
                        init.zeros_(module.bias)
                start_weights(module, std)
                module._is_hf_initialized = True  # ty: ignore[invalid-assignment]: as below
        super().initialize_weights()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        towers = (getattr(self.config, name) for name in self.config.sub_configs)
        configs = [config.moe_config for config in (self.config, *towers) if hasattr(config, "moe_config")]
        return super().get_correct_experts_implementation(
            experts_implementation(requested_experts, configs, self.config.dtype)
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """As in transformers; the folder also loads, with any Auto class of the family, where `mhmoe` is absent."""
        self.config.auto_map = auto_map(type(self.config))
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            # not the class of `self`, of which FSDP2 makes one of its own
            twin = model_class(PREFIX + self.dense.__name__)
            save_code(save_directory, twin, MHMoESparseMoeBlock, type(self.config))
        if push_to_hub:  # once the code is there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _forward(self, args: tuple, kwargs: dict[str, Any], output_router_logits: bool | None):
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        recorded = RouterLogits() if output_router_logits else None
        # also where nothing is recorded: torch.compile cannot trace one that is not set
        token = recording.set({} if recorded is None else {NAME: recorded})
        try:
            outputs = self.dense.forward(self, *args, **kwargs, return_dict=True)
        finally:
            recording.reset(token)
        if recorded is None or not recorded.rows:  # not asked for, or all layers are dense
            return outputs
        arguments = dict(zip(self.arguments, args, strict=False)) | kwargs
        aux_loss, z = self._router_losses(recorded, arguments)
        if outputs.get("loss") is not None:
            weighted = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z
            outputs["loss"] = outputs["loss"] + self._share(arguments) * weighted.to(outputs["loss"].device)
        # beam search repeats every tensor that an encoder returns, and cannot repeat a single number
        if hasattr(outputs, "loss") or torch.is_grad_enabled():
            outputs["aux_loss"] = aux_loss
        outputs["router_logits"] = tuple(
            head for stack, logits, _ in recorded.rows for head in by_head([logits], self._heads(stack))
        )
        return outputs

    def _router_losses(self, recorded: RouterLogits, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The means over encoders, and over the masks that each met, of load balancing loss and z-loss."""
        alike: dict[tuple, tuple[torch.Tensor | None, list[torch.Tensor]]] = {}
        masks: dict[tuple[int, int], torch.Tensor | None] = {}
        for stack, logits, mask in recorded.rows:
            if mask is None:
                key = stack, len(logits)
                if key not in masks:
                    masks[key] = self._input_mask(stack, logits, arguments)
                mask = masks[key]
            _, pooled = alike.setdefault((stack, id(mask)), (mask, []))
            pooled += by_head([logits], self._heads(stack))
        over_processes = (
            arguments.get("num_items_in_batch") is not None
            and self.training
            and distributed.is_available()
            and distributed.is_initialized()
        )
        balance, z = [], []
        for (stack, _), (mask, logits) in alike.items():
            moe_config = self.moe_configs[stack]
            balance.append(
                load_balancing_loss(
                    logits,
                    moe_config.num_experts_per_tok,
                    mask,
                    over_processes=over_processes,
                    scoring_func=moe_config.scoring_func,
                    groups=moe_config.num_moe_heads if moe_config.private_experts else 1,
                )
            )
            z.append(z_loss(logits, mask))
        return torch.stack(balance).mean(), torch.stack(z).mean()

    def _input_mask(self, stack: int, logits: torch.Tensor, arguments: dict) -> torch.Tensor | None:
        """The mask that came with the text, or with the patches, where it is of the tokens these logits are of."""
        mask = arguments.get("attention_mask" if self.read_text[stack] else "pixel_attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        tokens = len(logits) // self._heads(stack)
        if self.family.patches_first and self.read_text[stack] and tokens > mask.numel():
            patches = tokens // len(mask) - mask.shape[1]
            mask = torch.cat([mask.new_ones(len(mask), patches), mask], dim=1)
        return mask if mask.numel() == tokens else None

    def _heads(self, stack: int) -> int:
        return self.moe_configs[stack].num_moe_heads

    @staticmethod
    def _share(arguments: dict) -> torch.Tensor | float:
        """Of a step's targets, over its micro-batches and processes, those of this forward."""
        items, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
        return 1.0 if items is None or not isinstance(labels, torch.Tensor) else labels.ne(-100).sum() / items


def make_model(dense: Any) -> type[MHMoEEncoder]:
    """The twin of a model class of one of the families, a class of this module."""

    @wraps(dense.__init__)  # by whose signature it is known which parts can be asked for
    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        MHMoEEncoder.__init__(self, config, *args, **kwargs)

    @wraps(dense.forward)  # by whose signature Trainer goes
    @can_return_tuple
    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        return self._forward(args, kwargs, output_router_logits)

    adopt_renames(dense)
    namespace = {
        "dense": dense,
        "family": family_of(dense),
        "arguments": list(inspect.signature(dense.forward).parameters)[1:],  # without self
        "config_class": config_class(PREFIX + dense.config_class.__name__),
        "__init__": __init__,
        "forward": forward,
    }
    return make_class(dense, (MHMoEEncoder, dense), namespace, __name__)


def adopt_renames(dense: Any) -> None:
    """Let transformers read and write tensors' names as for the dense model, whose names on the Hub may be older."""
    dense_type = dense.config_class.model_type
    for name, twin in ((dense.__name__, PREFIX + dense.__name__), (dense_type, TYPE_PREFIX + dense_type)):
        if (renames := get_checkpoint_conversion_mapping(name)) is not None:
            register_checkpoint_conversion_mapping(twin, renames, overwrite=True)


def auto_map(twin: type[PreTrainedConfig]) -> dict[str, str]:
    """What a saved config says of the code beside it, so that every Auto class finds its own model there."""
    dense_type = twin.model_type.removeprefix(TYPE_PREFIX)
    models = {
        name: twin_of(mapping[dense_type])
        for name, auto_class in auto_classes(modeling_auto).items()
        if dense_type in (mapping := auto_class._model_mapping._model_mapping)
    }
    file, config_file = (module.split(".")[-1] for module in (__name__, twin.__module__))
    named = {name: f"{file}.{classes if isinstance(classes, str) else classes[0]}" for name, classes in models.items()}
    return {"AutoConfig": f"{config_file}.{twin.__name__}", **named}


def model_class(name: str) -> type[MHMoEEncoder]:
    """The model class of this name, such as "MHMoEViTModel", made when it is first asked for."""
    return twin_class(name, PreTrainedModel, make_model, globals())


__getattr__ = model_class
register_names(modeling_auto)
