"""DeepSeek-V3's balancing by a bias: what is counted, how the biases move, and when the Trainer moves them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bias_steps import RATE, ROWS, biases_after, trained_biases
from paths import SUPPORT
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from mhmoe import MHMoEForCausalLM
from mhmoe.evaluation.routing import RoutingRecorder
from mhmoe.modeling_mhmoe.bias_balancing import biased_routers


def make(**fields) -> MHMoEForCausalLM:
    return tiny_model(router_bias_update_rate=RATE, **fields).train()


def loads(model: MHMoEForCausalLM) -> torch.Tensor:
    return torch.stack([router.loads for router in biased_routers(model)])


def random_ids(batch: int = 3, tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(0))


MASKS = {
    "all": None,
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
}


def test_private_experts_move_as_their_head_s_loads_say():
    model = make(private_experts=True)
    model(random_ids())
    expected = [RATE * (head.float().mean() - head).sign() for layer in loads(model) for head in layer.view(2, 6)]
    model.update_router_biases()
    biases = [router.e_score_correction_bias for router in biased_routers(model)]
    torch.testing.assert_close(torch.cat(biases), torch.cat(expected))
    assert any(bias.unique().numel() > 1 for bias in biases)


class TestLoads:
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize(("heads", "private"), [(1, False), (4, False), (4, True)])
    def test_count_what_is_routed_but_padding(self, heads, private, mask):
        model = make(num_moe_heads=heads, private_experts=private)
        with RoutingRecorder(model) as recorder:
            counts = recorder.new_counts()
            model(random_ids(), attention_mask=mask)
            counts.add(recorder.chosen, mask)
        assert torch.equal(loads(model), counts.counts)
        assert loads(model).sum() == 2 * 2 * heads * (21 if mask is None else mask.sum())

    def test_add_up_over_forwards_and_not_over_those_that_do_not_train(self):
        model = make()
        model(random_ids())
        once = loads(model)
        with torch.no_grad():
            model(random_ids())
        model.eval()(random_ids())
        assert torch.equal(loads(model), once)
        model.train()(random_ids())
        assert torch.equal(loads(model), 2 * once)

    def test_mask_may_come_without_its_name(self):
        model, named = make(), make()
        model.model(random_ids(), MASKS["right"])
        named(random_ids(), attention_mask=MASKS["right"])
        assert torch.equal(loads(model), loads(named))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_counts_once(self, reentrant):
        model, checkpointed = make(), make()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for each in (model, checkpointed):
            each(random_ids(), labels=random_ids()).loss.backward()
        assert torch.equal(loads(checkpointed), loads(model))

    def test_models_without_a_rate_count_nothing_and_have_nothing_to_update(self):
        model = tiny_model().train()
        model(random_ids())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.update_router_biases()
        assert not biased_routers(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestUpdate:
    def test_moves_each_bias_by_the_sign_of_what_its_load_lacks(self):
        model = make()
        for router, counted in zip(biased_routers(model), ([6, 0, 3, 2, 3, 4], [1, 1, 1, 1, 1, 1]), strict=True):
            router.loads = torch.tensor(counted)
        model.update_router_biases()
        steps = torch.tensor([[-1.0, 1, 0, 1, 0, -1], [0, 0, 0, 0, 0, 0]])
        for router, step in zip(biased_routers(model), steps, strict=True):
            torch.testing.assert_close(router.e_score_correction_bias, RATE * step)
            assert router.loads is None
        model.update_router_biases()  # nothing was counted since
        torch.testing.assert_close(biased_routers(model)[0].e_score_correction_bias, RATE * steps[0])

    @pytest.mark.parametrize("fields", [{}, {"router_type": "xmoe", "scoring_func": "sigmoid"}], ids=str)
    def test_balances(self, fields):
        model = make(**fields)
        with torch.no_grad():
            for router in biased_routers(model):
                router.weight[0] = router.weight[1:].mean(0)  # an expert that is no sub-token's best
        spreads = []
        for _ in range(150):
            model(random_ids(16, 20))
            spreads.append(loads(model).float().std(dim=1).mean().item())
            model.update_router_biases()
        assert spreads[-1] < 0.7 * spreads[0]

    def test_weights_are_of_the_gates_alone(self):
        router = biased_routers(make(norm_topk_prob=False))[0]
        sub_tokens = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
        router.e_score_correction_bias[4] = 2.0
        logits, weights, chosen = router(sub_tokens)
        assert (chosen[:, 0] == 4).all()
        torch.testing.assert_close(weights, logits.softmax(-1).gather(1, chosen))
        assert not router.e_score_correction_bias.requires_grad

    def test_bias_stays_in_float32(self, tmp_path: Path):
        model = make()
        biased_routers(model)[0].e_score_correction_bias += 1 / 3
        expected = biased_routers(model)[0].e_score_correction_bias.clone()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(biased_routers(loaded)[0].e_score_correction_bias, expected)
        assert biased_routers(model.bfloat16())[0].e_score_correction_bias.dtype == torch.float32


class TestTrainer:
    def test_a_step_over_micro_batches_updates_once_by_all_of_them(self, tmp_path: Path):
        expected = biases_after([ROWS])
        assert expected["model.layers.0.mlp.gate.e_score_correction_bias"].abs().max() == pytest.approx(RATE)
        for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
            biases = trained_biases(ROWS, str(tmp_path), batch_size, accumulate)
            assert all(torch.equal(bias, expected[name]) for name, bias in biases.items())

    @pytest.mark.parametrize("plain", [False, True], ids=["own", "plain with the callback"])
    def test_each_step_updates(self, plain, tmp_path: Path):
        biases = trained_biases(ROWS, str(tmp_path), batch_size=2, accumulate=1, plain=plain)
        expected = biases_after([ROWS[:2], ROWS[2:]])
        assert all(torch.equal(bias, expected[name]) for name, bias in biases.items())
        assert any(bias.abs().max() > 1.5 * RATE for bias in biases.values())

    def test_two_processes_update_by_the_loads_of_both(self, tmp_path: Path):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        script = SUPPORT / "bias_steps.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, str(script), str(tmp_path)], check=True, env=environment)
        expected = biases_after([ROWS])
        for rank in range(2):
            biases = load_file(tmp_path / f"{rank}.safetensors")
            assert all(torch.equal(bias, expected[name]) for name, bias in biases.items())
