"""The sizes of an MH-MoE layer, and what they are where the user names none."""

from dataclasses import asdict, dataclass, fields

from transformers import PreTrainedConfig

from mhmoe import MHMoEConfig
from mhmoe.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """
    Fields of [`MHMoEConfig`]; `shared_expert_intermediate_size` is `None` where it is still open, `moe_latent_size`
    where there is none.
    """

    num_moe_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int | None = None
    moe_latent_size: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are not `None`, for a report."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def sizes_of(config: MHMoEConfig) -> Sizes:
    """Of the MH-MoE layers that `config` describes."""
    return Sizes(**{field.name: getattr(config, field.name) for field in fields(Sizes)})


def default_num_moe_heads(dense_config: PreTrainedConfig) -> int:
    """4, the heads of P1's experiments, or the nearest smaller number that divides the hidden size."""
    for heads in (4, 3, 2):
        if dense_config.hidden_size % heads == 0:
            return heads
    raise UserError(f"hidden_size={dense_config.hidden_size} divides by none of 4, 3, 2; give --num-moe-heads")


def default_num_experts(num_experts_per_tok: int, holders: int = 1) -> int:
    """32, dealt to the `holders` that have experts of their own, or as many as each sub-token is routed to."""
    return max(32 // holders, num_experts_per_tok)


def default_moe_intermediate_size(dense_config: PreTrainedConfig, num_moe_heads: int) -> int:
    """
    The dense FFN's inner size over 4 h, to the nearest multiple of 8: with k = 2 and h = 4 the routed experts add an
    eighth of the FFN's multiply-adds. Never less than d / 2h, which a lossless split of dense neurons needs.
    """
    width = round(dense_config.intermediate_size / (4 * num_moe_heads) / 8) * 8
    return max(width, -(-dense_config.hidden_size // (2 * num_moe_heads)))


def ffn_matrices(dense_config: PreTrainedConfig) -> int:
    """Of an FFN: 3, as it is gated in all families of decoders, or what the config says."""
    return getattr(dense_config, "ffn_matrices", 3)
