import pytest
import torch
from safetensors.torch import load_file
from tiny import CACHE, tiny_config, tiny_model
from torch.nn.functional import cross_entropy
from transformers import StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mhmoe import (
    MHMoEForCausalLM,
    MHMoEForQuestionAnswering,
    MHMoEForSequenceClassification,
    MHMoEForTokenClassification,
    MHMoEModel,
)
from mhmoe.modeling_mhmoe.modeling_mhmoe import MHMoETopKRouter


EXPERTS_IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "subtoken"]
ROWS = [[5, 9, 23, 4, 77, 18, 101], [64, 3, 3, 91], [12]]


def random_ids(batch: int = 2, tokens: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of one batch; padding's ids are real tokens, to leave a trace if they count."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = [42] * (longest - len(row))
        ids.append(row + padding if side == "right" else padding + row)
        mask.append([1] * len(row) + [0] * len(padding) if side == "right" else [0] * len(padding) + [1] * len(row))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def gradients(model: torch.nn.Module, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} gets no gradient"
        difference = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= rtol, f"{name}: {difference:.1e} relative"


def mlp_shapes(model: torch.nn.Module, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}.mlp."
    return {
        name.removeprefix(prefix): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }


DENSE = {"gate_proj.weight": (64, 48), "up_proj.weight": (64, 48), "down_proj.weight": (48, 64)}
SHARED = {
    "shared_expert.gate_proj.weight": (20, 48),
    "shared_expert.up_proj.weight": (20, 48),
    "shared_expert.down_proj.weight": (48, 20),
}


class TestStructure:
    def test_tensor_names_and_shapes(self):
        model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=20, mlp_only_layers=[0])
        assert mlp_shapes(model, 0) == DENSE
        assert mlp_shapes(model, 1) == SHARED | {
            "head_layer.weight": (48, 48),
            "merge_layer.weight": (48, 48),
            "gate.weight": (6, 12),
            "experts.gate_up_proj": (6, 32, 12),
            "experts.down_proj": (6, 12, 16),
        }
        others = {name for name in model.state_dict() if ".mlp." not in name and "layers.1." not in name}
        assert others == {
            "model.embed_tokens.weight",
            *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.norm.weight",
            "lm_head.weight",
        }

    def test_one_head_has_no_head_and_merge_layers(self):
        assert mlp_shapes(tiny_model(num_moe_heads=1), 0) == {
            "gate.weight": (6, 48),
            "experts.gate_up_proj": (6, 32, 48),
            "experts.down_proj": (6, 48, 16),
        }

    @pytest.mark.parametrize(
        ("fields", "dense"),
        [
            ({}, []),
            ({"decoder_sparse_step": 2}, [0, 2]),
            ({"mlp_only_layers": [1, 3]}, [1, 3]),
            ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3]),
        ],
    )
    def test_dense_layers_and_router_logits_of_the_others(self, fields, dense):
        model = tiny_model(num_hidden_layers=4, num_moe_heads=4, **fields)
        assert [layer for layer in range(4) if mlp_shapes(model, layer) == DENSE] == dense
        router_logits = model(random_ids(2, 5), output_router_logits=True).router_logits
        assert [tuple(logits.shape) for logits in router_logits] == [(2 * 5, 6)] * 4 * (4 - len(dense))

    def test_fresh_weights_are_drawn_and_none_is_left_empty(self):
        config = tiny_config(num_moe_heads=4, shared_expert_intermediate_size=20, initializer_range=0.3)
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(MHMoEForCausalLM(config))
        for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(weight, other), name
            if "norm" in name:
                assert torch.equal(weight, torch.ones_like(weight)), name
            else:
                assert weight.std().item() == pytest.approx(0.3, rel=0.2), name
                assert abs(weight.mean().item()) < 0.1, name


class TestBackends:
    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_attention_implementations_agree(self, padding_side):
        model = tiny_model(num_moe_heads=4)
        inputs = pad(ROWS, padding_side)
        real = inputs["attention_mask"].bool()
        logits = {}
        # compiling flex attention for this one batch would take minutes of a test that is about masks
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for implementation in ("eager", "sdpa", "flex_attention"):
                model.set_attn_implementation(implementation)
                assert model.config._attn_implementation == implementation
                logits[implementation] = model(**inputs).logits[real]
        torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits["flex_attention"], logits["eager"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS[1:])
    def test_experts_implementations_agree(self, implementation):
        model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=16, router_aux_loss_coef=0.1)
        ids = random_ids()
        inputs = {"input_ids": ids, "labels": ids, "output_router_logits": True}
        model.set_experts_implementation("eager")
        expected, expected_gradients = model(**inputs), gradients(model, **inputs)
        model.set_experts_implementation(implementation)
        assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
        torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs).loss, expected.loss)
        assert_same_gradients(gradients(model, **inputs), expected_gradients)

    @pytest.mark.parametrize(
        ("fields", "implementation"),
        [({}, "grouped_mm"), ({"num_moe_heads": 4}, "eager"), ({"moe_intermediate_size": 20}, "eager")],
        ids=str,
    )
    def test_default_experts_implementation_can_take_the_rows(self, fields, implementation, monkeypatch):
        """grouped_mm takes only rows of whole 16 bytes: 24 and 16 numbers are, 12 and 20 in bfloat16 are not."""
        monkeypatch.delitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "subtoken")  # as in a folder of remote code
        model = tiny_model(**fields).bfloat16()
        assert model.config._experts_implementation == implementation
        assert model(random_ids()).logits.isfinite().all()

    @pytest.mark.parametrize("fields", [{}, {"num_moe_heads": 4}], ids=str)
    def test_default_experts_implementation_is_the_fastest(self, fields, monkeypatch):
        assert tiny_model(**fields).config._experts_implementation == "subtoken"
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # where it is not known to be that
        assert tiny_model().config._experts_implementation == "grouped_mm"

    @pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "grouped_mm"), (torch.bfloat16, "eager")])
    def test_grouped_mm_where_it_cannot_run_gives_way(self, dtype, expected):
        config = tiny_config(num_moe_heads=4, dtype=dtype, experts_implementation="grouped_mm")  # rows of 12 numbers
        model = MHMoEForCausalLM(config).to(dtype)
        assert model.config._experts_implementation == expected
        assert model(torch.arange(3, 20)[None]).logits.isfinite().all()

    def test_implementations_can_be_chosen_at_loading(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = MHMoEForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager", experts_implementation="batched_mm"
        )
        assert model.config._attn_implementation == "eager"
        assert model.config._experts_implementation == "batched_mm"
        with pytest.raises(ValueError, match="not_a_backend"):
            MHMoEForCausalLM.from_pretrained(tmp_path, experts_implementation="not_a_backend")

    @pytest.mark.parametrize("implementation", ["grouped_mm", "subtoken"])
    def test_compiled_in_one_graph(self, implementation):
        """Forward and backward, with the auxiliary loss and a padding mask, in one graph without breaks."""
        if implementation == "grouped_mm" and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
            pytest.skip("the backward of grouped_mm on CPU has data-dependent sizes in this version of transformers")
        model = tiny_model(
            num_hidden_layers=1, shared_expert_intermediate_size=16, experts_implementation=implementation
        )
        inputs = {**pad(ROWS, "right"), "output_router_logits": True}
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        expected, expected_gradients = model(**inputs), gradients(model, **inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        outputs = compiled(**inputs)
        outputs.loss.backward()
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert_same_gradients(
            {name: parameter.grad for name, parameter in model.named_parameters()}, expected_gradients
        )

    @pytest.mark.parametrize("implementation", ["grouped_mm", "subtoken"])
    def test_compiled_step_on_a_static_cache(self, implementation):
        model = tiny_model(num_hidden_layers=1, experts_implementation=implementation)
        ids = random_ids(2, 6)
        cache = StaticCache(config=model.config, max_cache_len=8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            model(ids[:, :5], **{CACHE: cache})
            step = compiled(ids[:, 5:], **{CACHE: cache}, position_ids=torch.tensor([[5]]))
            torch.testing.assert_close(step.logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
    def test_low_precision_is_near_float32(self, dtype, implementation):
        fields = {"shared_expert_intermediate_size": 16, "num_experts_per_tok": 6}  # all experts: no tie can flip
        ids = random_ids()
        model = tiny_model(**fields)
        expected, expected_gradients = model(ids).logits, gradients(model, input_ids=ids, labels=ids)
        model = tiny_model(**fields).to(dtype)
        model.set_experts_implementation(implementation)
        logits = model(ids).logits
        assert logits.dtype == dtype
        tolerance = 0.03 if dtype == torch.bfloat16 else 0.004
        assert (logits.float() - expected).norm() <= tolerance * expected.norm()
        for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
            assert gradient.isfinite().all(), name
            difference = (gradient.float() - expected_gradients[name]).norm() / expected_gradients[name].norm()
            assert difference <= 3 * tolerance, f"{name}: {difference:.1e}"


class TestPaddingAndCache:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_rows_have_the_logits_of_the_rows_alone(self, side, attention):
        model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=16, attn_implementation=attention)
        inputs = pad(ROWS, side)
        with torch.no_grad():
            padded = model(**inputs).logits
            for row, logits, mask in zip(ROWS, padded, inputs["attention_mask"], strict=True):
                alone = model(torch.tensor([row])).logits[0]
                torch.testing.assert_close(logits[mask.bool()], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "fields", [{}, {"num_moe_heads": 1}, {"mlp_only_layers": [0]}, {"sliding_window": 4}], ids=str
    )
    def test_generation_is_the_same_with_any_cache(self, fields):
        model = tiny_model(**{"num_moe_heads": 4, **fields})
        ids = random_ids(2, 6)
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
        settings["return_dict_in_generate"] = True
        expected = model.generate(ids, use_cache=False, **settings)
        assert expected.sequences.shape == (2, 14)
        for cache in ("dynamic", "static"):
            outputs = model.generate(ids, cache_implementation=cache, **settings)
            assert torch.equal(outputs.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(outputs.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)

    def test_left_padded_rows_generate_what_they_generate_alone(self):
        model = tiny_model(num_moe_heads=4)
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        batch = model.generate(**pad(ROWS, "left"), **settings)[:, -6:]
        for row, generated in zip(ROWS, batch, strict=True):
            ids = torch.tensor([row])
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, -6:], generated)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generation_with_router_logits_and_a_mask(self, cache):
        """Each step's router logits are of its own tokens, though the mask covers the cached ones too."""
        model = tiny_model(num_moe_heads=4, output_router_logits=True)
        inputs = pad(ROWS, "left")
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
        sequences = model.generate(**inputs, **settings)
        model.config.output_router_logits = False
        assert torch.equal(sequences, model.generate(**inputs, **settings))

    def test_aux_loss_of_a_step_on_a_cache_is_of_its_tokens(self):
        model = tiny_model(num_moe_heads=4)
        ids = random_ids(2, 6)
        mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
        with torch.no_grad():
            cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)[CACHE]
            step = model(ids[:, 4:], attention_mask=mask, **{CACHE: cache}, output_router_logits=True)
            whole = model(ids, attention_mask=mask, output_router_logits=True)
        assert [tuple(logits.shape) for logits in step.router_logits] == [(2 * 2, 6)] * 4 * 2
        for logits, all_logits in zip(step.router_logits, whole.router_logits, strict=True):
            last = all_logits.reshape(2, 6, 6)[:, 4:].reshape(-1, 6)
            torch.testing.assert_close(logits, last, rtol=1e-4, atol=1e-5)
        routed = torch.zeros(6)
        probability = torch.zeros(6)
        counted = mask[:, 4:].flatten().bool()
        for logits in step.router_logits:
            probabilities = logits[counted].softmax(-1)
            routed += probabilities.topk(2).indices.flatten().bincount(minlength=6)
            probability += probabilities.sum(0)
        rows = 2 * 4 * counted.sum()
        torch.testing.assert_close(step.aux_loss, 6 * (routed / rows * probability / rows).sum())

    def test_sliding_window_forgets(self):
        model = tiny_model(num_hidden_layers=1, sliding_window=4)
        whole = tiny_model(num_hidden_layers=1)
        ids = random_ids(1, 10)
        changed = ids.clone()
        changed[0, 0] = 1
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            with torch.no_grad():
                difference = (model(changed).logits - model(ids).logits).abs().amax(-1)[0]
            assert (difference[:4] > 1e-4).all()
            assert (difference[4:] < 1e-6).all()
        with torch.no_grad():
            assert ((whole(changed).logits - whole(ids).logits).abs().amax(-1)[0] > 1e-6).all()

    def test_sliding_window_reaches_the_attention_kernel(self, monkeypatch):
        """Flash attention takes no mask and has the window from its arguments alone."""
        windows = []

        def spy(*args, sliding_window=None, **kwargs):
            windows.append(sliding_window)
            return sdpa_attention_forward(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
        tiny_model(sliding_window=4)(random_ids())
        tiny_model()(random_ids())
        assert windows == [4, 4, None, None]

    def test_packed_rows_have_the_logits_of_the_rows_alone(self):
        """Positions that start again mark where the next of several rows in one begins."""
        model = tiny_model(num_moe_heads=4)
        packed = torch.tensor([[token for row in ROWS for token in row]])
        positions = torch.tensor([[position for row in ROWS for position in range(len(row))]])
        with torch.no_grad():
            logits = model(packed, position_ids=positions, use_cache=False).logits[0]
            alone = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)

    def test_logits_to_keep(self):
        model = tiny_model()
        ids = random_ids()
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, logits[:, [0, 7]])

    def test_embeddings_in_place_of_ids(self):
        model = tiny_model()
        ids = random_ids()
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)

    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        ],
        ids=lambda rope: rope["rope_type"],
    )
    def test_rope_variants(self, rope):
        fields = {"max_position_embeddings": 8, "head_dim": 16}
        model = tiny_model(**fields, rope_parameters={"rope_theta": 1e4, **rope})
        ids = random_ids(1, 24)  # dynamic scaling starts beyond max_position_embeddings
        with torch.no_grad():
            scaled, plain = model(ids).logits, tiny_model(**fields)(ids).logits
        assert scaled.isfinite().all()
        assert (scaled - plain).abs().max() > 1e-4
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        assert model.generate(ids, **settings).shape == (1, 27)


class TestTraining:
    def test_gradient_checkpointing_keeps_the_gradients(self):
        model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=16, router_aux_loss_coef=0.1).train()
        calls = []
        for module in model.modules():
            if isinstance(module, MHMoETopKRouter):
                module.register_forward_hook(lambda *_: calls.append(1))
        ids = random_ids()
        inputs = {"input_ids": ids, "labels": ids, "output_router_logits": True}
        expected = gradients(model, **inputs)
        assert len(calls) == 2
        model.gradient_checkpointing_enable()
        assert_same_gradients(gradients(model, **inputs), expected, rtol=1e-6)
        assert len(calls) == 6  # the two layers are run again in the backward pass

    def test_loss_is_the_mean_cross_entropy_of_the_next_tokens(self):
        model = tiny_model()
        ids = random_ids()
        labels = ids.clone()
        labels[0, :5] = -100
        outputs = model(ids, labels=labels)
        expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(outputs.loss, expected)

    def test_resized_embeddings(self):
        model = tiny_model()
        ids = random_ids()
        logits = model(ids).logits
        model.resize_token_embeddings(140)
        assert model.config.vocab_size == 140
        assert tuple(model.lm_head.weight.shape) == (140, 48)
        torch.testing.assert_close(model(ids).logits[..., :128], logits)
        ids[0, 3] = 139
        assert model(ids, labels=ids).loss.isfinite()
        model.resize_token_embeddings(120)
        assert model(ids.clamp(max=119)).logits.shape == (2, 10, 120)

    def test_tied_embeddings(self, tmp_path):
        model = tiny_model(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        loaded = MHMoEForCausalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        ids = random_ids()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        loaded.resize_token_embeddings(140)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert tuple(loaded.lm_head.weight.shape) == (140, 48)

    def test_untied_embeddings_are_saved_apart(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


class TestHeads:
    """Three labels; the second row is padded on the right."""

    inputs = pad(ROWS[:2], "right")

    def make(self, model_class, **overrides):
        torch.manual_seed(0)
        config = tiny_config(num_labels=3, initializer_range=0.1, **overrides)
        return model_class(config).eval()

    def test_base_model(self):
        model = self.make(MHMoEModel)
        outputs = model(**self.inputs, output_hidden_states=True, output_router_logits=True)
        assert outputs.last_hidden_state.shape == (2, 7, 48)
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 7, 48)] * 3
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [(2 * 7, 6)] * 2 * 2
        model.set_attn_implementation("eager")
        attentions = model(**self.inputs, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 7, 7)] * 2

    def test_sequence_classification_reads_the_last_real_token(self):
        inputs = {**self.inputs, "input_ids": self.inputs["input_ids"] * self.inputs["attention_mask"]}  # pad id 0
        model = self.make(MHMoEForSequenceClassification)
        labels = torch.tensor([2, 0])
        outputs = model(**inputs, labels=labels)
        assert outputs.logits.shape == (2, 3)
        torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, labels))
        for row, logits in zip(ROWS[:2], outputs.logits, strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0], rtol=1e-4, atol=1e-5)
        outputs.loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())

    def test_token_classification(self):
        model = self.make(MHMoEForTokenClassification)
        labels = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [1, 1, 2, 0, -100, -100, -100]])
        outputs = model(**self.inputs, labels=labels)
        assert outputs.logits.shape == (2, 7, 3)
        torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()))
        outputs.loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())

    def test_question_answering(self):
        model = self.make(MHMoEForQuestionAnswering)
        starts, ends = torch.tensor([1, 0]), torch.tensor([4, 3])
        outputs = model(**self.inputs, start_positions=starts, end_positions=ends)
        assert outputs.start_logits.shape == outputs.end_logits.shape == (2, 7)
        expected = (cross_entropy(outputs.start_logits, starts) + cross_entropy(outputs.end_logits, ends)) / 2
        torch.testing.assert_close(outputs.loss, expected)
        outputs.loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())

    @pytest.mark.parametrize(
        "model_class",
        [MHMoEModel, MHMoEForSequenceClassification, MHMoEForTokenClassification, MHMoEForQuestionAnswering],
    )
    def test_backbone_loads_into_every_head(self, model_class, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path)
        backbone = loaded if model_class is MHMoEModel else loaded.base_model
        ids = random_ids()
        torch.testing.assert_close(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)
