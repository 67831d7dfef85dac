"""What a conversion strategy is: what it says of itself, the sizes that follow from it, and the layers it makes."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedConfig

from mhmoe.configuration import parity
from mhmoe.errors import UserError

from ..calibration import LayerByLayer, LayerWalk, dense_walk
from ..kmeans import router_rows
from ..sizes import Sizes, default_moe_intermediate_size, default_num_moe_heads, ffn_matrices


if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..tensors import DenseFFN, DenseWeights

PROGRAM_BYTES = 500_000_000  # what Python, torch and transformers take before anything is converted
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Promise:
    """
    What a strategy promises of the logits; that all tensors besides the FFNs are the dense model's is promised by all.

    Attributes:
        in_short: for a table of strategies.
        text: for the model card; a sentence that goes on after "What it promises: ".
        max_logit_difference: the largest difference, in logits, with greedy text the same; 0 holds in every
            floating-point type, any other in float32. `None`: nothing is promised.
        max_perplexity_ratio: of the MH-MoE model to the dense one, where nothing is promised of single logits.
    """

    in_short: str
    text: str
    max_logit_difference: float | None = None
    max_perplexity_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """
    The options that one strategy has beside those in [`ConversionOptions`]: none. A strategy with some inherits and
    adds fields made by [`mhmoe.options.option`], which become flags, and checks them in `__post_init__`.
    """


class ConversionStrategy(ABC):
    """
    One way from dense FFNs to MH-MoE layers; all other tensors are copied whatever the strategy.

    The class answers what can be said of a checkpoint from its config; an instance makes the tensors.

    Args:
        recipe: the resolved conversion; its `config` is the MH-MoE model's, its `dense_config` the source's.
        weights: the dense model's tensors.
        token_ids: of the calibration text, (B, T), for a strategy that `needs_text`, or for the router.

    Attributes:
        name: as users write it.
        summary: what becomes of the dense FFN, for the help and for a table of strategies.
        promise: what `mhmoe verify` checks and the card says.
        untrained: for the card; what the model is before any training, in a sentence or two.
        needs_text: whether it cannot do without a calibration text.
        keeps_ffns: whether the dense FFNs stay as they are, as shared experts.
        needs_gates: whether it is for gated FFNs alone, which all decoders that convert have, and few encoders.
        Options: the options that only this strategy has.
        defaults: for the help; how it chooses sizes that the user does not name, by field, where it differs.
        made_from: tensors of an MH-MoE layer, by the tensor of the dense FFN whose stored type they take; the others
            have the config's.
        family: options of layers of later papers (`private_experts`, `router_input`, `moe_latent_size`) that it can
            give a start.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    promise: ClassVar[Promise]
    untrained: ClassVar[str]
    needs_text: ClassVar[bool] = False
    keeps_ffns: ClassVar[bool] = False
    needs_gates: ClassVar[bool] = False
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    defaults: ClassVar[Mapping[str, str]] = {}
    made_from: ClassVar[Mapping[str, str]] = {}
    family: ClassVar[Collection[str]] = ()

    def __init__(self, recipe: "Recipe", weights: "DenseWeights", token_ids: torch.Tensor | None = None):
        self.config = recipe.config
        self.dense_config = recipe.dense_config
        self.options = recipe.strategy_options
        self.seed = recipe.options.seed
        self.router_init = recipe.options.router_init
        self.shapes = recipe.ffn_shapes
        self.weights = weights
        self.token_ids = token_ids
        self._walk = LayerByLayer(self._walk_dense)

    def _walk_dense(self) -> Iterator[LayerWalk]:
        assert self.token_ids is not None  # who asks for it has a text
        yield from dense_walk(self.dense_config, self.token_ids, self.weights.load)

    @staticmethod
    def default_heads(dense_config: PreTrainedConfig) -> int:
        """num_moe_heads where the user names none."""
        return default_num_moe_heads(dense_config)

    @staticmethod
    def default_inner_size(dense_config: PreTrainedConfig, num_moe_heads: int) -> int:
        """moe_intermediate_size where the user names none."""
        return default_moe_intermediate_size(dense_config, num_moe_heads)

    @classmethod
    @abstractmethod
    def shared_width(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> int:
        """
        The shared expert's inner size.

        Args:
            dense_config: of the source.
            sizes: unchecked; its `shared_expert_intermediate_size` is what the user asks for, `None` for whatever the
                strategy needs.
        """

    @classmethod
    def match_dense(cls, dense_config: PreTrainedConfig, sizes: Sizes) -> Sizes:
        """
        `sizes` with the FFN multiply-adds of the dense model: the routed experts get what the shared expert leaves.

        Raises:
            UserError: it leaves nothing.
        """
        shared, ff = cls.shared_width(dense_config, sizes), dense_config.intermediate_size
        heads, top_k = sizes.num_moe_heads, sizes.num_experts_per_tok
        try:
            inner, _ = parity.match_dense(
                dense_config.hidden_size,
                ff,
                heads,
                top_k,
                shared_size=shared,
                matrices=ffn_matrices(dense_config),
                latent_size=sizes.moe_latent_size,
            )
        except ValueError as error:
            raise UserError(
                f"--match dense: strategy {cls.name} with shared_expert_intermediate_size={shared} costs more than "
                f"the dense FFN ({ff}), head and merge layer counted; choose another strategy"
            ) from error
        return replace(sizes, moe_intermediate_size=inner)

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Raise a [`UserError`] if the strategy cannot keep its promise with this recipe's sizes and options."""
        return

    @classmethod
    def peak_memory(cls, recipe: "Recipe", stored_itemsize: int) -> int:
        """Bytes that converting takes, estimated: one tensor is written while the next is read or made in float32."""
        config = recipe.config
        d, latent = config.hidden_size, config.latent_size
        routed = config.num_routed_experts * config.moe_intermediate_size * config.sub_token_size
        embedding = config.vocab_size * d * stored_itemsize
        head_dim = config.head_dim or d // config.num_attention_heads
        in_order = [embedding, config.num_attention_heads * head_dim * d * stored_itemsize]
        in_order += [FLOAT32 * d * latent, FLOAT32 * d * latent, FLOAT32 * 2 * routed, FLOAT32 * routed]
        in_order += 3 * [d * config.shared_expert_intermediate_size * stored_itemsize]
        in_order += [] if config.tie_word_embeddings else [d * stored_itemsize, embedding]
        return PROGRAM_BYTES + max(a + b for a, b in pairwise(in_order))

    @abstractmethod
    def layer(self, layer: int, ffn: "DenseFFN") -> Iterator[tuple[str, torch.Tensor]]:
        """
        Yield every tensor of the MH-MoE layer `layer`, by its name in the layer (`self.shapes` has them all), made
        from the dense `ffn`. They are written one by one, best in the order of `self.shapes`, so that a layer need not
        be in memory whole.
        """

    def measured(self) -> dict:
        """What the strategy measured on the calibration text, for the report; asked for when all is written."""
        return {}

    @classmethod
    def describe(cls, figures: dict) -> str:
        """What `measured` gave, as Markdown for the card."""
        return ""

    def fresh(self, layer: int, part: str) -> torch.Tensor:
        """
        A random start of the tensor `part` of a layer, float32. It depends on seed, layer, part and shape alone, so
        neither the order of writing nor the sharding changes it.

        Head layer: Xavier-uniform with gain 1/sqrt(2), merge layer: with gain 1 (P1). All others: normal with variance
        1 / inputs, so that they carry the size of their input on, and no two experts are alike; biases: zero.
        """
        value = torch.empty(self.shapes[part])
        if part.endswith(".bias"):
            return value.zero_()
        if part in ("head_layer.weight", "merge_layer.weight"):
            gain = 1 / math.sqrt(2) if part == "head_layer.weight" else 1.0
            return torch.nn.init.xavier_uniform_(value, gain=gain, generator=self.generator(layer, part))
        return value.normal_(0, value.shape[-1] ** -0.5, generator=self.generator(layer, part))

    def router(
        self, layer: int, head_layer: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        The router's weight, (E, d/h), random or from clusters of the text's sub-tokens, as the user asks.

        Args:
            layer: which one.
            head_layer: gives the head layer's weight, (d, d).
            inputs: what the FFN of this layer sees of each row of the text, (T, d); by default, in the dense model.
        """
        part = "gate.weight"
        if self.router_init == "random":
            return self.fresh(layer, part)
        experts, sub_size = self.shapes[part]
        head = head_layer().float()
        inputs = self._walk[layer].inputs() if inputs is None else inputs
        sub_tokens = torch.cat([(row @ head.T).view(-1, sub_size) for row in inputs])
        return router_rows(sub_tokens, experts, self.config.num_experts_per_tok, self.generator(layer, part))

    def generator(self, layer: int, part: str) -> torch.Generator:
        """A generator for one tensor, or one step, of a layer alone."""
        return seeded_generator(f"model.layers.{layer}.mlp.{part}", self.seed)

    @classmethod
    def needs_width(cls, width: int, sizes: Sizes) -> int:
        """`width`, where the user asks for no other shared expert; a [`UserError`] otherwise."""
        asked = sizes.shared_expert_intermediate_size
        if asked not in (None, width):
            raise UserError(
                f"--shared-expert-intermediate-size {asked}: strategy {cls.name} needs {width}; leave it out"
            )
        return width


def seeded_generator(name: str, seed: int) -> torch.Generator:
    """A generator for what has this name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
