"""
Which ways to lay a model out on several GPUs fit into their memory, by formula, before anything runs.

Bytes are those of one GPU. What the formulas leave out (CUDA's context, buffers of its libraries, fragments) has to do
with a tenth of the memory.
"""

import re
from dataclasses import asdict, dataclass
from math import gcd

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mhmoe.errors import UserError, one_line


GIB = 2**30
UNITS = {"": GIB, "gib": GIB, "gb": GIB, "mib": 2**20, "mb": 2**20}  # 80GB is what a GPU with 80 GiB is called
USABLE = 0.9
SPLITS = re.compile("colwise|rowwise")  # in the name of a style of transformers' tensor parallelism
ADAM_STATES = 2
# what DeepSpeed gathers and reduces at once where its config says nothing else, in parameters
ZERO3_LIVE, ZERO3_BUCKET = 10**9, 5 * 10**8


def read_memory(given: str | float) -> int:
    """
    Bytes of "80" (GiB), "80GB" or "79.2 GiB".

    Raises:
        UserError: it is none of these, or not more than nothing.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(given).lower())
    try:
        size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"memory={given}: is no size; give the memory of one GPU in GiB, as 80, or as 80GB")
    return size


@dataclass(frozen=True)
class Run:
    """
    What a GPU has to do.

    Attributes:
        batch_size: rows on each GPU at once.
        block_size: tokens of a row.
        checkpointing: whether only the layers' inputs are kept for the backward pass.
    """

    batch_size: int
    block_size: int
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size


@dataclass(frozen=True)
class Weights:
    """
    Parameters of a model, as layouts tell them apart.

    Attributes:
        total: all; a tied embedding counts once.
        split: that tensor parallelism divides; of the others each process has all.
        layer: of the largest decoder layer.
        layer_experts: of its routed experts.
        outside: of what is in no decoder layer.
        num_experts: routed experts of a layer, 0 where there are none.
    """

    total: int
    split: int
    layer: int
    layer_experts: int
    outside: int
    num_experts: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Weights":
        """Counted on the model that `config` describes, without memory for its weights."""
        model = on_meta(config)
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        layers: dict[str, int] = {}
        for name, number in counts.items():
            if found := re.search(r"\blayers\.(\d+)\.", name):
                layers[found[1]] = layers.get(found[1], 0) + number
        largest = max(layers, key=layers.__getitem__)
        experts = {name: number for name, number in counts.items() if ".mlp.experts." in name}
        split = _split_by_tensor_parallelism(model)
        return cls(
            total=sum(counts.values()),
            split=sum(counts[name] for name in split),
            layer=layers[largest],
            layer_experts=sum(number for name, number in experts.items() if f".layers.{largest}." in name),
            outside=sum(counts.values()) - sum(layers.values()),
            num_experts=config.num_routed_experts if experts else 0,
        )


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """
    The causal language model that `config` describes, without memory for its weights.

    Raises:
        UserError: there is none.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of a field that no check of the config knows
        raise UserError(f"{config.model_type}: no model can be built of its config ({one_line(error)})") from error


def _split_by_tensor_parallelism(model: PreTrainedModel) -> set[str]:
    plan = {rule: style for rule, style in (model.tp_plan or {}).items() if SPLITS.search(style)}
    found = set()
    for name, _ in model.named_parameters():
        rule = re.sub(r"\.\d+\.", ".*.", name)
        owner = rule.rpartition(".")[0]
        each_has_all = name.endswith(".bias") and plan.get(owner) == "rowwise"
        if (rule in plan or owner in plan) and not each_has_all:
            found.add(name)
    return found


@dataclass(frozen=True)
class Bytes:
    """
    Of one GPU.

    Attributes:
        weights, gradients, optimizer: what stays there.
        gathered: other GPUs' weights (and their gradients) that a layer needs for a moment; DDP's and DeepSpeed's
            buffers.
        activations: kept for the backward pass; in inference the cache, and what a layer needs.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def training_layouts(weights: Weights, gpus: int, itemsize: int, activations: int) -> dict[str, Bytes]:
    """
    Of training with AdamW, by layout; those that one GPU has no use for are left out.

    Args:
        itemsize: bytes of a weight, a gradient and each of Adam's two numbers.
        activations: bytes, see [`activation_bytes`].
    """

    def states(parameters: float, gathered: float = 0, copies_of_weights: int = 1) -> Bytes:
        held = int(parameters * itemsize)
        return Bytes(copies_of_weights * held, held, ADAM_STATES * held, int(gathered * itemsize), activations)

    layouts = {"one GPU": states(weights.total)}
    if gpus == 1:
        return layouts
    layouts["DDP"] = states(weights.total, gathered=weights.total)  # its buckets hold the gradients once more
    # this layer's weights and gradients, the next one's weights, and what is in no layer
    layouts["FSDP2"] = states(weights.total / gpus, 3 * weights.layer + 2 * weights.outside)
    if (groups := expert_groups(weights, gpus)) > 1:
        layer = weights.layer - weights.layer_experts + weights.layer_experts / groups
        layouts[f"FSDP2 + EP {groups}"] = states(weights.total / gpus, 3 * layer + 2 * weights.outside)
    live = min(weights.total, max(ZERO3_LIVE, weights.layer)) + min(weights.total, ZERO3_BUCKET)
    layouts["ZeRO-3"] = states(weights.total / gpus, live, copies_of_weights=2)  # the optimizer has its own
    return layouts


def inference_layouts(
    weights: Weights, gpus: int, itemsize: int, working: int, config: PreTrainedConfig
) -> dict[str, Bytes]:
    """
    Of generation, by layout.

    Args:
        itemsize: bytes of a weight.
        working: bytes of the cache and of one layer at work, see [`inference_bytes`].
    """
    layouts = {"one GPU": Bytes(weights.total * itemsize, activations=working)}
    if gpus > 1 and not any(size % gpus for size in _sizes_to_split(config)):
        held = weights.total - weights.split + weights.split // gpus
        layouts[f"TP {gpus}"] = Bytes(held * itemsize, activations=working // gpus)
    return layouts


def expert_groups(weights: Weights, gpus: int) -> int:
    """The most processes, a divisor of `gpus`, that whole experts can be dealt to; 1 where there are no experts."""
    return gcd(gpus, weights.num_experts) if weights.num_experts else 1


def activation_bytes(config: PreTrainedConfig, run: Run, itemsize: int) -> int:
    """
    Kept by a training forward for its backward pass, with the experts backend `grouped_mm` and SDPA; and three times
    the logits in float32, which the loss needs at once.
    """
    layers = [_layer_bytes(config, layer, itemsize) for layer in range(config.num_hidden_layers)]
    kept = sum(layers)
    if run.checkpointing:
        kept = len(layers) * config.hidden_size * itemsize + max(layers)
    return run.tokens * (kept + 3 * config.hidden_size * itemsize + 3 * 4 * config.vocab_size)


def inference_bytes(config: PreTrainedConfig, run: Run, itemsize: int) -> int:
    """The cache of the rows, one layer at work on all their tokens, and their last logits."""
    cache = config.num_hidden_layers * 2 * config.num_key_value_heads * _head_dim(config) * itemsize
    at_work = max(_layer_bytes(config, layer, itemsize) for layer in range(config.num_hidden_layers))
    return run.tokens * (cache + at_work) + run.batch_size * config.vocab_size * 4


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _sizes_to_split(config: PreTrainedConfig) -> list[int]:
    """What tensor parallelism divides by the number of its processes."""
    sizes = [config.num_attention_heads, config.num_key_value_heads, config.intermediate_size]
    if config.model_type == "mhmoe":
        sizes += [config.moe_intermediate_size, config.shared_expert_intermediate_size]
    return sizes


def _layer_bytes(config: PreTrainedConfig, layer: int, itemsize: int) -> int:
    """Kept of one token by one decoder layer."""
    # each product's result and the activations: of gate, up, act(gate) and the product, or of up and act(up)
    d, of_inner = config.hidden_size, 2 * (getattr(config, "ffn_matrices", 3) - 1)
    queries, keys = (heads * _head_dim(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    numbers = 6 * d + 2 * queries + 2 * keys
    exact = 4 * (config.num_attention_heads + 2)  # bytes of what is float32 always
    if config.model_type != "mhmoe" or layer not in config.moe_layers:
        return (numbers + of_inner * config.intermediate_size) * itemsize + exact
    chosen, of_expert = config.num_moe_heads * config.num_experts_per_tok, 2 * (config.expert.matrices - 1)
    numbers += 2 * config.latent_size + of_inner * config.shared_expert_intermediate_size
    numbers += chosen * (2 * config.sub_token_size + of_expert * config.moe_intermediate_size + 1)
    exact += 4 * config.num_moe_heads * config.num_experts + 4 * 8 * chosen  # the router's, and indices
    return numbers * itemsize + exact
