"""What holds of the routing in any MH-MoE model, whatever its config."""

import torch
from configs import mhmoe_configs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhmoe import MHMoEForCausalLM
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoESparseMoeBlock


ANY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
PADDING = 4  # tokens


def model_of(config) -> MHMoEForCausalLM:
    """In evaluation mode, in float64 so that rounding hides nothing, and with biases that change the choice."""
    torch.manual_seed(0)
    model = MHMoEForCausalLM(config).double().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.5)
    return model


def blocks(model: MHMoEForCausalLM) -> list[MHMoESparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, MHMoESparseMoeBlock)]


def states(config, rows: int = 2, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, config.hidden_size, generator=generator, dtype=torch.float64)


@ANY
@given(mhmoe_configs())
def test_each_sub_token_has_its_experts_and_their_weights(config):
    for block in blocks(model_of(config)):
        width = config.hidden_size // config.num_moe_heads
        logits, weights, chosen = block.gate(states(config).view(-1, width))
        assert chosen.shape == weights.shape == (2 * 5 * config.num_moe_heads, config.num_experts_per_tok)
        assert all(len(set(experts)) == config.num_experts_per_tok for experts in chosen.tolist())
        assert 0 <= chosen.min() <= chosen.max() < config.num_experts
        scores = logits.float().softmax(-1) if config.scoring_func == "softmax" else logits.float().sigmoid()
        expected = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            expected = expected / expected.sum(-1, keepdim=True)
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), dtype=weights.dtype))
        torch.testing.assert_close(weights.float(), expected)
        if not config.router_bias_update_rate:
            assert torch.equal(
                logits.float().topk(config.num_experts_per_tok).values, logits.float().gather(-1, chosen)
            )


@ANY
@given(mhmoe_configs(), st.permutations(range(10)))
def test_tokens_do_not_see_each_other(config, order):
    for block in blocks(model_of(config)):
        tokens = states(config).flatten(0, 1)[None]  # (1, 10, d)
        torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])
        torch.testing.assert_close(block(tokens[:, :1]), block(tokens)[:, :1])


@ANY
@given(mhmoe_configs(), st.sampled_from(["left", "right"]), st.integers(0, 31))
def test_padding_changes_nothing(config, side, pad_token):
    assume(side == "right" or not config.use_bitnet)  # which makes much of the last bits
    model = model_of(config)
    ids = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(2))
    padding = torch.full((2, PADDING), pad_token)
    parts = (padding, ids) if side == "left" else (ids, padding)
    padded, mask = torch.cat(parts, dim=1), torch.cat([torch.full_like(part, part is ids) for part in parts], dim=1)
    # rotations are in float32, and padding on the left moves them
    close = {"rtol": 1e-4, "atol": 1e-5} if side == "left" else {}
    with torch.no_grad():
        alone = model(ids, output_router_logits=True)
        among = model(padded, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(among.logits[mask.bool()], alone.logits.flatten(0, 1), **close)
    if config.moe_layers:
        torch.testing.assert_close(among.aux_loss, alone.aux_loss, **close)
