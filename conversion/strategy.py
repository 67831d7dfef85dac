"""What a conversion strategy decides: the config fields that follow from it, and how each FFN tensor is made."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from transformers import PreTrainedConfig

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError

from .calibration import Dense, DenseWalk
from .kmeans import router_rows
from .sizes import default_moe_intermediate_size, default_num_moe_heads


RouterInit = Literal["random", "kmeans"]
CALIBRATION_TOKENS = 32768  # of a calibration text, unless the user says otherwise


class ConversionStrategy(ABC):
    """
    One way from dense FFNs to MH-MoE layers; all other tensors are copied whatever the strategy.

    Args:
        dense: config of the source.
        sizes: num_moe_heads, num_experts, num_experts_per_tok and moe_intermediate_size, unchecked before `check`.
        seed: of the tensors that start random.
        calibration: token ids of a text, (B, T), for a strategy that `needs_calibration`, or for the router.
        router_init: "random", or "kmeans" for one cluster of the text's sub-tokens per expert.
        distillation_steps: for a strategy that distils.
    """

    name: str
    needs_calibration = False
    _dense_walk: DenseWalk | None = None

    def __init__(
        self,
        dense: PreTrainedConfig,
        sizes: dict[str, int],
        seed: int,
        calibration: torch.Tensor | None = None,
        router_init: RouterInit = "random",
        distillation_steps: int = 0,
    ):
        self.dense = dense
        self.sizes = sizes
        self.seed = seed
        self.calibration = calibration
        self.router_init = router_init
        self.distillation_steps = distillation_steps

    @staticmethod
    def default_heads(dense: PreTrainedConfig) -> int:
        """num_moe_heads where the user names none."""
        return default_num_moe_heads(dense)

    @staticmethod
    def default_inner_size(dense: PreTrainedConfig, num_moe_heads: int) -> int:
        """moe_intermediate_size where the user names none."""
        return default_moe_intermediate_size(dense, num_moe_heads)

    @abstractmethod
    def shared_width(self, asked: int | None) -> int:
        """shared_expert_intermediate_size; `asked` is what the user wants, `None` for whatever the strategy needs."""

    @abstractmethod
    def check(self, config: MHMoEConfig) -> None:
        """Raise a [`UserError`] if the strategy cannot keep its promise at these sizes."""

    @abstractmethod
    def sources(self, name: str) -> tuple[str, ...]:
        """The dense tensors that the FFN tensor `name` is made from; it takes the type of the first."""

    @abstractmethod
    def value(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        """The FFN tensor `name`. It holds no more than one layer's dense FFN in memory besides the result."""

    def measured(self, dense: Dense) -> dict:
        """What the strategy measured on the calibration text, for the report."""
        return {}

    def _router(self, name: str, shape: tuple[int, ...], dense: Dense) -> torch.Tensor:
        """The router's rows, (E, d/h)."""
        if self.router_init == "random":
            return self._fresh(name, shape)
        head_name = name.replace(".gate.", ".head_layer.")
        head = self.value(head_name, (self.dense.hidden_size,) * 2, dense).float()
        inputs = self._ffn_inputs(int(name.split(".")[2]), dense)
        sub_tokens = torch.cat([(row @ head.T).view(-1, shape[1]) for row in inputs])
        return router_rows(sub_tokens, shape[0], self.sizes["num_experts_per_tok"], seeded_generator(name, self.seed))

    def _ffn_inputs(self, layer: int, dense: Dense) -> Iterable[torch.Tensor]:
        """What the FFN of `layer` sees of the calibration text, row by row, (T, d)."""
        if self._dense_walk is None or layer < self._dense_walk.layer:
            self._dense_walk = DenseWalk(self.dense, self.calibration, dense)
        self._dense_walk.move_to(layer)
        return self._dense_walk.inputs()

    def _fixed_width(self, width: int, asked: int | None) -> int:
        if asked not in (None, width):
            raise UserError(
                f"--shared-expert-intermediate-size {asked}: strategy {self.name} needs {width}; leave it out"
            )
        return width

    def _fresh(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return fresh_value(name, shape, self.seed)


def fresh_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """
    A random start of a tensor, float32. It depends on seed, name and shape alone, so neither the order of writing nor
    the sharding changes it.

    Head layer: Xavier-uniform with gain 1/sqrt(2), merge layer: with gain 1 (P1). All others: normal with variance
    1 / inputs, so that they carry the size of their input on, and no two experts are alike; biases: zero.
    """
    generator = seeded_generator(name, seed)
    value = torch.empty(shape)
    if name.endswith(".bias"):
        return value.zero_()
    if name.endswith((".mlp.head_layer.weight", ".mlp.merge_layer.weight")):
        gain = 1 / math.sqrt(2) if name.endswith(".mlp.head_layer.weight") else 1.0
        return torch.nn.init.xavier_uniform_(value, gain=gain, generator=generator)
    return value.normal_(0, shape[-1] ** -0.5, generator=generator)


def seeded_generator(name: str, seed: int) -> torch.Generator:
    """A generator for the tensor `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
