"""
Sizes of an MH-MoE layer that cost what another layer costs (P2, arXiv 2411.16205, "FLOPs parity", "parameter parity").

d: hidden size, h: MoE heads, i: inner size of a routed expert, k: experts per (sub-)token, E: experts, s: inner size
of the shared expert, m: matrices of an FFN (3 if it is gated, as here, and 2 if not, as in part of P2). Per token, an
MH-MoE layer makes 2 d^2 + m d i k + m d s multiply-adds and has 2 d^2 + m (d/h) i E + m d s parameters, its router
left out; without sub-tokens (h = 1) the first term, head and merge layers, is absent. With a latent size l
(LatentMoE, arXiv 2601.18089) there are 2 d l + m l i k + m d s multiply-adds and 2 d l + m (l/h) i E + m d s
parameters. E counts the experts of one head where these are private, and the layer has h times as many.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parity:
    """
    Sizes that meet a target.

    Attributes:
        moe_intermediate_size: i, a positive multiple of 8.
        num_experts: E, a positive multiple of 8.
        solved_intermediate_size: i before it was rounded.
        solved_experts: E before it was rounded, for the rounded i.
    """

    moe_intermediate_size: int
    num_experts: int
    solved_intermediate_size: float
    solved_experts: float


def intermediate_size_for(
    multiply_adds: float,
    hidden_size: int,
    heads: int,
    top_k: int,
    shared_size: float = 0,
    matrices: int = 3,
    latent_size: int | None = None,
) -> float:
    """
    i for which an MH-MoE layer makes `multiply_adds` per token: P2's i = (3 i_s k_s - 2 d) / (3 k) and its eq. 8. For
    those of a dense gated FFN of width ff, with a shared expert: s + k i = ff - 2 d / 3. Neither rounded nor checked:
    it may be negative.
    """
    mixing = _mixing(hidden_size, heads, latent_size)
    latent_size = latent_size or hidden_size
    routed = (multiply_adds - mixing) / (matrices * latent_size * top_k)
    return routed - shared_size * (hidden_size / latent_size) / top_k


def experts_for(
    parameters: float,
    hidden_size: int,
    heads: int,
    intermediate_size: float,
    shared_size: float = 0,
    matrices: int = 3,
    latent_size: int | None = None,
    private_experts: bool = False,
) -> float:
    """E for which an MH-MoE layer has `parameters`: P2's E = (3 d i_s E_s - 2 d^2) / (3 (d/h) i). Not rounded."""
    routed = parameters - _mixing(hidden_size, heads, latent_size) - matrices * hidden_size * shared_size
    holders = 1 if private_experts else heads  # of one expert's d/h, or l/h, numbers
    return routed / (matrices * ((latent_size or hidden_size) / holders) * intermediate_size)


def match_smoe(
    hidden_size: int,
    heads: int,
    top_k: int,
    *,
    reference_size: int,
    reference_experts: int = 8,
    reference_top_k: int = 1,
    matrices: int = 3,
    latent_size: int | None = None,
    private_experts: bool = False,
) -> Parity:
    """
    Sizes with the multiply-adds and the parameters of a sparse MoE layer of `reference_experts` experts of inner size
    `reference_size`, as in P2's experiment. A shared expert that both layers have changes nothing.

    Raises:
        ValueError: no positive size does that; the message names the sizes.
    """
    multiply_adds = matrices * hidden_size * reference_size * reference_top_k
    exact_size = intermediate_size_for(
        multiply_adds, hidden_size, heads, top_k, matrices=matrices, latent_size=latent_size
    )
    size = nearest_multiple(exact_size)
    if size < 8:
        raise ValueError(
            f"top-{reference_top_k} of inner size {reference_size} leaves routed experts an inner size of "
            f"{exact_size:.0f} with num_experts_per_tok={top_k}; choose fewer per token, or a larger reference"
        )
    parameters = matrices * hidden_size * reference_size * reference_experts
    exact_experts = experts_for(
        parameters,
        hidden_size,
        heads,
        size,
        matrices=matrices,
        latent_size=latent_size,
        private_experts=private_experts,
    )
    return Parity(size, max(nearest_multiple(exact_experts), 8), exact_size, exact_experts)


def match_dense(
    hidden_size: int,
    intermediate_size: int,
    heads: int,
    top_k: int,
    *,
    shared_size: int | None = None,
    size: int = 0,
    matrices: int = 3,
    latent_size: int | None = None,
) -> tuple[int, int]:
    """
    Inner sizes (i, s) of routed and shared experts with the multiply-adds of a dense FFN of `intermediate_size`: of
    i = `size` for which s is solved, or of s = `shared_size` for which i is. Both are multiples of 8; s may be 0.

    Raises:
        ValueError: no such sizes; the message names them.
    """
    multiply_adds = matrices * hidden_size * intermediate_size
    if shared_size is not None:
        exact_size = intermediate_size_for(
            multiply_adds, hidden_size, heads, top_k, shared_size, matrices, latent_size=latent_size
        )
        size = nearest_multiple(exact_size)
        if size < 8:
            raise ValueError(
                f"shared_expert_intermediate_size={shared_size} leaves routed experts an inner size of "
                f"{exact_size:.0f} in the multiply-adds of the dense FFN ({intermediate_size}); give a smaller one"
            )
        return size, shared_size
    exact_size = intermediate_size_for(
        multiply_adds, hidden_size, heads, top_k, matrices=matrices, latent_size=latent_size
    )
    shared_size = nearest_multiple((exact_size * top_k - top_k * size) * ((latent_size or hidden_size) / hidden_size))
    if shared_size < 0:
        raise ValueError(
            f"moe_intermediate_size={size} with num_experts_per_tok={top_k} takes more multiply-adds than the dense "
            f"FFN ({intermediate_size}); give a smaller one"
        )
    return size, shared_size


def nearest_multiple(value: float, of: int = 8) -> int:
    return int(value / of + 0.5) * of if value > 0 else -int(-value / of + 0.5) * of


def _mixing(hidden_size: int, heads: int, latent_size: int | None) -> int:
    """Of head and merge layers."""
    return 2 * hidden_size * (latent_size or hidden_size) if heads > 1 or latent_size else 0
