"""BitNet b1.58 layers beside their numbers, which test_numerics compares: what is quantised, and packed weights."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from mhmoe import MHMoEForCausalLM, MHMoEForSequenceClassification
from mhmoe.modeling_mhmoe import bitnet


IDS = torch.arange(3, 23).view(2, 10)
VARIANTS = {
    "gated": {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "two matrices": {"gated_mlp": False, "mlp_bias": True, "head_merge_bias": True, "mlp_only_layers": [1]},
    "odd sizes": {"moe_intermediate_size": 7, "num_moe_heads": 16, "intermediate_size": 50},
    "tied, deep": {"tie_word_embeddings": True, "head_layer_depth": 2, "router_type": "xmoe"},
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def bit_model(**fields) -> MHMoEForCausalLM:
    return tiny_model(use_bitnet=True, **fields)


class TestLayers:
    @each_variant
    def test_all_of_the_decoder_layers_but_routers_and_norms(self, fields):
        model = bit_model(**fields)
        quantised = {
            f"{module}.{name}"
            for module, found in model.named_modules()
            if isinstance(found, bitnet.BitLinear | bitnet.TernaryExperts)
            for name in found.matrices
        }
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        others = ("model.embed_tokens.weight", "lm_head.weight", "gate.weight", "gate.projection")
        assert quantised == {name for name in matrices if not name.endswith(others)}
        assert not any(isinstance(module, bitnet.BitLinear) for module in model.lm_head.modules())

    @each_variant
    def test_names_are_those_of_the_plain_model(self, fields):
        assert bit_model(**fields).state_dict().keys() == tiny_model(**fields).state_dict().keys()
        for (name, weight), plain in zip(
            bit_model(**fields).named_parameters(), tiny_model(**fields).parameters(), strict=True
        ):
            assert torch.equal(weight, plain), name

    def test_weights_are_ternary_with_a_scale_for_each_matrix(self):
        experts = bit_model(num_experts=2).model.layers[0].mlp.experts
        with torch.no_grad():
            experts.gate_up_proj[0] *= 3
            experts.gate_up_proj[1, :16] *= 5  # the gate of the second expert, and not its up
        seen = experts.seen("gate_up_proj", torch.float32)
        matrices = [*seen[0].chunk(2), *seen[1].chunk(2)]
        kept = [*experts.gate_up_proj[0].chunk(2), *experts.gate_up_proj[1].chunk(2)]
        for matrix, weights in zip(matrices, kept, strict=True):
            scale = weights.abs().mean()
            torch.testing.assert_close(matrix.unique(), torch.stack([-scale, torch.zeros(()), scale]))
            assert torch.equal(matrix != 0, weights.abs() > scale / 2)
        assert matrices[2].max() > 3 * matrices[3].max()

    def test_activations_have_255_steps_each_row_for_itself(self):
        rows = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-3], [1e3]])
        for row, seen in zip(rows, bitnet.quantize_activations(rows), strict=True):
            step = row.abs().max() / 127
            assert 100 < len(seen.unique()) <= 255
            assert (seen - row).abs().max() <= step * 0.5001
            torch.testing.assert_close(seen / step, (seen / step).round(), rtol=0, atol=1e-3)

    def test_zeros_stay_zeros(self):
        layer = bitnet.BitLinear(8, 4, bias=False)
        zeros = torch.zeros(2, 8, requires_grad=True)
        assert not layer(zeros).any()
        nn.init.zeros_(layer.weight)
        output = layer(torch.randn(2, 8))
        output.sum().backward()
        assert not output.any()
        assert layer.weight.grad.isfinite().all()

    def test_gradients_pass_the_rounding(self):
        layer = bitnet.BitLinear(16, 5, bias=True)
        inputs = torch.randn(7, 16, requires_grad=True)
        weights = torch.randn(7, 5)
        (layer(inputs) * weights).sum().backward()
        ternary = layer.weight.abs().mean() * (layer.weight / layer.weight.abs().mean()).round().clamp(-1, 1)
        torch.testing.assert_close(inputs.grad, weights @ ternary)
        torch.testing.assert_close(layer.weight.grad, weights.T @ bitnet.quantize_activations(inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("backend", bitnet.BACKENDS)
    def test_low_precision(self, backend, dtype):
        model = bit_model(experts_implementation=backend).to(dtype)
        outputs = model(IDS, labels=IDS)
        outputs.loss.backward()
        assert outputs.logits.dtype == dtype
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)

    @pytest.mark.parametrize("fields", [{}, {"gated_mlp": False}], ids=str)
    def test_every_weight_learns_with_and_without_checkpointing(self, fields):
        model = bit_model(**fields).train()
        model(IDS, labels=IDS).loss.backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, expected[name])

    def test_learns_in_spite_of_the_rounding(self):
        model = bit_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            loss = model(IDS, labels=IDS).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0] / 2

    def test_compiled_in_one_graph(self):
        model = bit_model(num_hidden_layers=1, experts_implementation="batched_mm").train()
        torch._dynamo.reset()
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, model(IDS, labels=IDS).loss)
        loss.backward()

    def test_backends_that_round_nothing_inside_are_refused(self):
        model = bit_model()
        with pytest.raises(ValueError, match=r"experts_implementation='sonicmoe'.* eager, grouped_mm, batched_mm"):
            model.set_experts_implementation("sonicmoe")

    def test_no_tensor_parallel_plan(self):
        assert tiny_config(use_bitnet=True).base_model_tp_plan == {}
        assert tiny_config(use_bitnet=True).base_model_ep_plan == tiny_config().base_model_ep_plan
        assert tiny_config(use_bitnet=True, bitnet_packed=True).base_model_ep_plan == {}


class TestPacked:
    @pytest.mark.parametrize(
        "shape", [(1, 3), (2, 3), (3, 3), (4, 1), (5, 2), (6, 4), (2, 7, 3), (3, 2, 9, 2)], ids=str
    )
    def test_signs_survive(self, shape):
        signs = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).float()
        packed = bitnet.pack(signs)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*shape[:-2], -(-shape[-2] // 4), shape[-1])
        assert torch.equal(bitnet.unpack(packed, shape[-2]).float(), signs)

    @pytest.mark.parametrize("backend", bitnet.BACKENDS)
    @each_variant
    def test_same_outputs(self, fields, backend, tmp_path: Path):
        if backend == "grouped_mm" and fields is VARIANTS["odd sizes"]:
            pytest.skip("grouped_mm takes no rows of 7 numbers")
        model = bit_model(**fields)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which start at zero, and would hide a lost one
                nn.init.normal_(parameter)
        model.save_packed(tmp_path)
        model.set_experts_implementation(backend)
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True, experts_implementation=backend
        )
        assert not any(loading[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is MHMoEForCausalLM
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
            base = AutoModel.from_pretrained(tmp_path, experts_implementation=backend)
            torch.testing.assert_close(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_same_outputs_in_low_precision(self, dtype, tmp_path: Path):
        bit_model().save_pretrained(tmp_path / "whole")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
        model.save_packed(tmp_path / "packed")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert loaded.dtype == dtype
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)

    def test_saved_again_and_with_another_head(self, tmp_path: Path):
        torch.manual_seed(0)
        model = MHMoEForSequenceClassification(tiny_config(use_bitnet=True, num_labels=3)).eval()
        model.save_packed(tmp_path / "packed", max_shard_size="10KB")
        assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
        loaded = MHMoEForSequenceClassification.from_pretrained(tmp_path / "packed")
        loaded.save_pretrained(tmp_path / "again")
        again = MHMoEForSequenceClassification.from_pretrained(tmp_path / "again")
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model(IDS).logits)

    def test_weights_take_two_bits(self, tmp_path: Path):
        fields = {"vocab_size": 8, "hidden_size": 192, "intermediate_size": 256, "moe_intermediate_size": 96}
        model = bit_model(**fields)
        model.save_pretrained(tmp_path / "whole")
        model.save_packed(tmp_path / "packed")
        whole, packed = ((tmp_path / folder / "model.safetensors").stat().st_size for folder in ("whole", "packed"))
        assert 1 / 16 < packed / whole < 1 / 12  # of float32, beside embeddings, routers, norms and scales

    def test_the_model_stays_as_it_was(self, tmp_path: Path):
        model = bit_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_packed(tmp_path)
        assert not model.config.bitnet_packed
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_refused_where_there_is_nothing_to_pack(self, tmp_path: Path):
        with pytest.raises(ValueError, match="use_bitnet=False"):
            tiny_model().save_packed(tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        bit_model().save_packed(tmp_path)
        with pytest.raises(ValueError, match="bitnet_packed=True"):
            AutoModelForCausalLM.from_pretrained(tmp_path).save_packed(tmp_path / "packed")
