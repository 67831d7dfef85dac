"""Sizes of the MH-MoE layers where the user names none."""

from transformers import PreTrainedConfig

from mhmoe.errors import UserError


def default_num_moe_heads(dense: PreTrainedConfig) -> int:
    """4, the heads of P1's experiments, or the nearest smaller number that divides the hidden size."""
    for heads in (4, 3, 2):
        if dense.hidden_size % heads == 0:
            return heads
    raise UserError(f"hidden_size={dense.hidden_size} divides by none of 4, 3, 2; give --num-moe-heads")


def default_moe_intermediate_size(dense: PreTrainedConfig, num_moe_heads: int) -> int:
    """
    The dense FFN's inner size over 4 h, to the nearest multiple of 8: with k = 2 and h = 4 the routed experts add an
    eighth of the FFN's multiply-adds. Never less than d / 2h, which a lossless split of dense neurons needs.
    """
    width = round(dense.intermediate_size / (4 * num_moe_heads) / 8) * 8
    return max(width, -(-dense.hidden_size // (2 * num_moe_heads)))
