import math

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_sparse_moe
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mhmoe import MHMoEForCausalLM, MHMoEForTokenClassification, MHMoEModel
from mhmoe.evaluation import ExpertCounts, RoutingRecorder
from mhmoe.evaluation.routing import MODEL_TYPES, different_experts


class Wrapper(torch.nn.Module):
    """What DDP and accelerate do to a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def random_batch(rows=3, tokens=5):
    return torch.randint(1, 128, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fields", [{}, {"num_moe_heads": 1}, {"num_moe_heads": 3, "num_experts_per_tok": 3}])
def test_recorder_sees_the_experts_that_the_router_logits_say(fields):
    model = tiny_model(num_hidden_layers=3, decoder_sparse_step=2, mlp_only_layers=[], **fields)
    with RoutingRecorder(model) as recorder:
        outputs = model(random_batch(), output_router_logits=True)
        chosen = recorder.chosen

    assert recorder.layers == [1] == model.config.moe_layers
    heads = model.config.num_moe_heads
    assert (len(chosen), len(outputs.router_logits)) == (1, heads)
    assert chosen[0].shape == (3 * 5 * model.config.num_moe_heads, model.config.num_experts_per_tok)
    expected = torch.stack(outputs.router_logits, dim=1).flatten(0, 1).topk(model.config.num_experts_per_tok).indices
    torch.testing.assert_close(chosen[0].sort(dim=1).values, expected.sort(dim=1).values)


def test_recorder_keeps_the_last_forward_only_and_lets_go():
    model = tiny_model()
    recorder = RoutingRecorder(model)
    with recorder:
        model(random_batch(3, 5))
        model(random_batch(2, 4))
        assert [len(chosen) for chosen in recorder.chosen] == [2 * 4 * 2] * 2
    model(random_batch())
    with pytest.raises(RuntimeError, match="no forward was recorded"):
        recorder.chosen  # noqa: B018


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.model,
        lambda model: MHMoEModel(model.config),
        lambda model: MHMoEForTokenClassification(model.config),
        lambda model: Wrapper(model),
        lambda model: Wrapper(Wrapper(model.model)),
    ],
    ids=["base model of a head", "base model", "another head", "wrapped", "wrapped twice"],
)
def test_recorder_finds_the_routers_of_any_model(wrap):
    model = wrap(tiny_model())
    with RoutingRecorder(model) as recorder:
        model(random_batch())
        assert [len(chosen) for chosen in recorder.chosen] == [30, 30]
    assert recorder.layers == [0, 1]


def test_recorder_finds_the_routers_of_remote_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    remote_class = get_class_from_dynamic_module("modeling_mhmoe.MHMoEForCausalLM", tmp_path)
    model = remote_class.from_pretrained(tmp_path)
    assert not isinstance(model, MHMoEForCausalLM)
    with RoutingRecorder(model) as recorder:
        model(random_batch())
        assert [len(chosen) for chosen in recorder.chosen] == [30, 30]


def test_a_dense_model_has_nothing_to_record():
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with RoutingRecorder(LlamaForCausalLM(config)) as recorder:
        assert recorder.layers == []
        assert recorder.chosen == []
    assert RoutingRecorder(tiny_model(mlp_only_layers=[0, 1])).layers == []


@pytest.mark.parametrize("mask", [None, "padding", "booleans", "times"])
def test_counts_equal_a_count_by_hand(mask):
    config = tiny_config(num_moe_heads=3)
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.rand(2 * 4 * 3, 6, generator=generator).topk(2).indices for _ in range(2)]
    times = {
        None: None,
        "padding": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        "booleans": torch.tensor([[True, False, True, True], [False, False, False, False]]),
        "times": torch.tensor([[0, 1, 2, 3], [3, 0, 0, 1]]),
    }[mask]

    counts = ExpertCounts([0, 1], config.num_experts, num_heads=3)
    counts.add(chosen, times)
    counts.add(chosen, times)

    expected = [[0] * 6, [0] * 6]
    reach = [[0] * 7, [0] * 7]
    num_sub_tokens = 0
    for row in range(2):
        for token in range(4):
            for layer in range(2):
                first = (row * 4 + token) * 3
                experts = {expert for head in range(3) for expert in chosen[layer][first + head].tolist()}
                reach[layer][len(experts)] += 2 if times is None else 2 * int(times[row, token])
            for head in range(3):
                weight = 2 if times is None else 2 * int(times[row, token])
                num_sub_tokens += weight
                for layer in range(2):
                    for expert in chosen[layer][(row * 4 + token) * 3 + head].tolist():
                        expected[layer][expert] += weight
    assert counts.counts.tolist() == expected
    assert counts.reach.tolist() == reach
    assert len({number for row in reach for number, tokens in enumerate(row) if tokens}) > 1  # or it would say little
    means = [sum(number * tokens for number, tokens in enumerate(row)) / counts.num_tokens for row in reach]
    assert counts.experts_per_token.tolist() == pytest.approx(means)
    assert counts.num_sub_tokens == num_sub_tokens == 3 * counts.num_tokens
    assert counts.counts.dtype == torch.int64
    assert counts.counts.sum(dim=1).tolist() == [2 * num_sub_tokens] * 2


def test_padding_does_not_count():
    model = tiny_model()
    rows = [random_batch(1, tokens)[0] for tokens in (7, 3, 5)]
    recorder = RoutingRecorder(model)
    alone, padded = recorder.new_counts(), recorder.new_counts()
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # with id 0, on the right
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    with recorder:
        model(batch, attention_mask=mask)
        padded.add(recorder.chosen, mask)
        for row in rows:
            model(row[None])
            alone.add(recorder.chosen)
    assert padded.summary() == alone.summary()
    assert padded.num_sub_tokens == 15 * 2


def test_counts_of_parts_add_up():
    chosen = [torch.tensor([[0, 1], [0, 2]])]
    first, second, both = (ExpertCounts([3], 4) for _ in range(3))
    first.add(chosen)
    second.add([chosen[0] + 1])
    both.add(chosen)
    both.add([chosen[0] + 1])
    assert (first + second).summary() == both.summary()
    assert (first + second).reach.tolist() == both.reach.tolist() == [[0, 0, 4, 0, 0]]
    assert first.num_sub_tokens == 2  # unchanged
    with pytest.raises(ValueError, match=r"layers \[3\] with 4 experts .* layers \[2\] with 4 experts"):
        first + ExpertCounts([2], 4)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(0, 2)])
def test_a_mask_of_other_tokens_is_refused(mask):
    with pytest.raises(ValueError, match="3 sub-tokens cannot belong to a mask of"):
        ExpertCounts([0], 4).add([torch.zeros(3, 1, dtype=torch.int64)], mask)


def test_without_a_mask_the_sub_tokens_must_make_whole_tokens():
    with pytest.raises(ValueError, match="3 sub-tokens cannot belong to tokens of 2"):
        ExpertCounts([0], 4, num_heads=2).add([torch.zeros(3, 1, dtype=torch.int64)])


def test_different_experts_of_a_token():
    choices = [[3, 1, 3, 1], [0, 1, 2, 3], [2, 2, 2, 2], [1, 0, 0, 2]]
    assert different_experts(torch.tensor(choices)).tolist() == [2, 4, 1, 3]
    assert different_experts(torch.tensor([[5], [0]])).tolist() == [1, 1]  # one head, one expert


def test_frequency_and_activation():
    counts = ExpertCounts([0, 2], 4)
    counts.counts = torch.tensor([[10, 8, 2, 0], [9, 9, 1, 1]])
    counts.num_tokens = 10  # of two heads
    assert counts.frequency.tolist() == [[1.0, 0.8, 0.2, 0.0], [0.9, 0.9, 0.1, 0.1]]
    assert counts.share_above(0.0).tolist() == counts.share_activated.tolist() == [0.75, 1.0]
    assert counts.share_above(0.1).tolist() == [0.75, 0.5]  # more than the threshold, not as much
    assert counts.share_above(0.9).tolist() == [0.25, 0.0]


@pytest.mark.parametrize("model_type", MODEL_TYPES[1:])
def test_plain_sparse_moe_is_recorded_where_it_is_asked_for(model_type):
    model = tiny_sparse_moe(model_type)
    chosen = []
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[-1]))
    assert RoutingRecorder(model).layers == []
    with RoutingRecorder(model, MODEL_TYPES) as recorder:
        model(random_batch())
        counts = recorder.new_counts()
        counts.add(recorder.chosen)
    assert recorder.layers == ([1] if model_type.startswith("deepseek") else [0, 1])
    assert recorder.decoder is model.model
    for row, choices in zip(counts.counts, chosen, strict=True):
        assert row.tolist() == choices.flatten().bincount(minlength=5).tolist()
    assert (counts.num_tokens, counts.num_sub_tokens) == (15, 15)
    assert set(counts.experts_per_token.tolist()) == {2.0}


def test_summary_of_known_counts():
    counts = ExpertCounts([1, 3, 5], 4)
    counts.counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [15, 5, 0, 0]])
    counts.reach = torch.tensor([[0, 4, 6, 0, 0], [0, 10, 0, 0, 0], [0, 0, 5, 5, 0]])
    counts.num_sub_tokens, counts.num_tokens = 20, 10
    summary = counts.summary()

    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert [layer["layer"] for layer in summary["layers"]] == [1, 3, 5]
    assert [layer["share_activated"] for layer in summary["layers"]] == [1.0, 0.25, 0.5]
    assert [layer["entropy"] for layer in summary["layers"]] == pytest.approx([1.0, 0.0, uneven])
    assert [layer["max_over_mean_load"] for layer in summary["layers"]] == [1.0, 4.0, 3.0]
    assert summary["layers"][2]["load"] == [0.75, 0.25, 0.0, 0.0]
    assert summary["layers"][2]["counts"] == [15, 5, 0, 0]
    assert summary["share_activated"] == pytest.approx(7 / 12)
    assert summary["entropy"] == pytest.approx((1 + uneven) / 3)
    assert summary["max_over_mean_load"] == 4.0
    assert [layer["experts_per_token"] for layer in summary["layers"]] == pytest.approx([1.6, 1.0, 2.5])
    assert summary["experts_per_token"] == pytest.approx(5.1 / 3)
    assert (summary["num_sub_tokens"], summary["num_tokens"]) == (20, 10)


def test_summary_of_nothing_and_of_one_expert_is_finite():
    nothing = ExpertCounts([0], 4).summary()
    assert (nothing["share_activated"], nothing["entropy"], nothing["layers"][0]["load"]) == (0.0, 0.0, [0.0] * 4)
    single = ExpertCounts([0], 1)
    single.add([torch.zeros(3, 1, dtype=torch.int64)])
    assert (single.summary()["entropy"], single.summary()["max_over_mean_load"]) == (1.0, 1.0)


def test_private_experts_are_counted_for_each_head_and_named():
    model = tiny_model(private_experts=True)
    with RoutingRecorder(model) as recorder:
        counts = recorder.new_counts()
        outputs = model(random_batch(), output_router_logits=True)
        counts.add(recorder.chosen)
    chosen = [logits.topk(2).indices.flatten().bincount(minlength=6) for logits in outputs.router_logits]
    assert torch.equal(counts.counts, torch.cat(chosen).view(2, 12))
    assert [counts.name(expert) for expert in (0, 5, 6, 11)] == [
        "head 0, expert 0",
        "head 0, expert 5",
        "head 1, expert 0",
        "head 1, expert 5",
    ]
    assert counts.name(7) == (counts + counts).summary()["experts"][7]
    assert ExpertCounts([0], 12, 2).name(7) == "expert 7"
    assert "experts" not in ExpertCounts([0], 12, 2).summary()
