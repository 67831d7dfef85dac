"""Encoders with MH-MoE layers: what they are, next to the dense models whose twins they are."""

import copy
import inspect
import json
import logging
import pickle
from dataclasses import replace

import pytest
import reference
import torch
from tiny_encoders import MASKED, MOE, TINY, picture, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.models.auto import modeling_auto

import mhmoe
from mhmoe.encoders.costs import encoders_of
from mhmoe.encoders.families import FAMILIES, auto_classes
from mhmoe.errors import UserError
from mhmoe.loading import load_causal_lm
from mhmoe.params_command import main as count


ACTIVATIONS = {"gelu": lambda x: x / 2 * (1 + torch.erf(x / 2**0.5))}


def said(model, **inputs) -> torch.Tensor:
    """What the model says of its inputs: logits, or states where it has no head."""
    torch.manual_seed(0)  # ViLT draws among patches
    with torch.no_grad():
        outputs = model(**inputs)
    names = ("logits", "logits_per_text", "last_hidden_state", "multimodal_embeddings", "feature_maps")
    found = next(outputs[name] for name in names if outputs.get(name) is not None)
    return torch.cat([part.flatten() for part in found]) if isinstance(found, tuple) else found


def blocks_of(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith(".moe")}


class TestTwins:
    def test_parts_that_a_dense_model_makes_on_request(self):
        dense, config = mhmoe.MHMoEViTModel.dense, TINY["vit"].config()
        assert inspect.signature(mhmoe.MHMoEViTModel.__init__) == inspect.signature(dense.__init__)
        model = mhmoe.MHMoEViTModel(config, add_pooling_layer=False, use_mask_token=True)
        assert model.pooler is None
        masked = torch.zeros(2, 4, dtype=torch.bool)
        masked[:, 0] = True
        pictures = TINY["vit"].inputs()["pixel_values"]
        plain, hidden = (
            model(pictures, bool_masked_pos=mask).last_hidden_state for mask in (torch.zeros_like(masked), masked)
        )
        assert not torch.equal(plain, hidden)

    @pytest.mark.parametrize("name", TINY)
    def test_a_dense_model_s_tensors_with_a_merge_layer_of_zero_say_the_same_to_the_bit(self, name):
        tiny = TINY[name]
        dense, twin = tiny.make(dense=True), tiny.make()
        missing, unexpected = twin.load_state_dict(dense.state_dict(), strict=False)
        assert not unexpected
        assert {".moe." in tensor for tensor in missing} == {True}
        assert not torch.equal(said(dense, **tiny.inputs()), said(twin, **tiny.inputs()))
        for block in blocks_of(twin).values():
            torch.nn.init.zeros_(block.merge_layer.weight)
        assert torch.equal(said(dense, **tiny.inputs()), said(twin, **tiny.inputs()))

    @pytest.mark.parametrize("name", TINY)
    @pytest.mark.parametrize("shared", [True, False])
    def test_saved_and_loaded_to_the_bit(self, name, shared, tmp_path):
        tiny = TINY[name]
        model = tiny.make(**({} if shared else {"shared_expert_intermediate_size": 0}))
        model.save_pretrained(tmp_path)
        loaded, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values())
        # a copy, whose tensors lie as the model's do: in a file they may not, and products then round otherwise
        assert torch.equal(said(copy.deepcopy(loaded).eval(), **tiny.inputs()), said(model, **tiny.inputs()))
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is type(model.config)
        assert [config.moe_config.to_dict() for config in encoders_of(again).values()] == [
            config.moe_config.to_dict() for config in encoders_of(model.config).values()
        ]

    @pytest.mark.parametrize("model_type", FAMILIES)
    def test_every_auto_class_of_the_dense_twin_knows_it(self, model_type):
        config = AutoConfig.for_model(f"mhmoe_{model_type}")
        assert config.model_type == f"mhmoe_{model_type}"
        known = 0
        for auto_class in auto_classes(modeling_auto).values():
            names = auto_class._model_mapping._model_mapping
            if model_type in names:
                dense = auto_class._model_mapping[type(AutoConfig.for_model(model_type))]
                twin = auto_class._model_mapping[type(config)]
                for one, other in zip(
                    *((of if isinstance(of, tuple) else (of,)) for of in (dense, twin)), strict=True
                ):
                    assert other.__name__ == f"MHMoE{one.__name__}"
                    assert issubclass(other, one)
                    assert getattr(mhmoe, other.__name__) is other
                known += 1
        assert known > 0

    def test_classes_and_models_pickle_and_copy(self):
        model = TINY["bert"].make()
        inputs = TINY["bert"].inputs()
        assert pickle.loads(pickle.dumps(type(model))) is mhmoe.MHMoEBertForMaskedLM
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(said(other, **inputs), said(model, **inputs))
            with torch.no_grad():
                blocks_of(other)["bert.encoder.layer.0.intermediate.moe"].merge_layer.weight.add_(1)
            assert not torch.equal(said(other, **inputs), said(model, **inputs))

    @pytest.mark.parametrize("name", ["MHMoEViTMAEModel", "MHMoENothing", "MHMoEGPT2Model", "MHMoELlamaConfig"])
    def test_what_has_no_twin(self, name):
        with pytest.raises(AttributeError, match=name):
            getattr(mhmoe, name)

    def test_dense_layers(self):
        model = TINY["vit"].make(decoder_sparse_step=2)
        assert list(blocks_of(model)) == ["vit.layers.1.mlp.moe"]
        model = TINY["bert"].make(mlp_only_layers=[1], shared_expert_intermediate_size=0)
        assert list(blocks_of(model)) == ["bert.encoder.layer.0.intermediate.moe"]
        assert "bert.encoder.layer.0.output.dense.weight" not in model.state_dict()
        assert "bert.encoder.layer.1.output.dense.weight" in model.state_dict()

    @pytest.mark.parametrize("name", ["vit", "bert", "modernbert"])
    def test_a_narrower_shared_expert(self, name, tmp_path):
        model = TINY[name].make(shared_expert_intermediate_size=8)
        shapes = {tuple(tensor.shape) for tensor in model.state_dict().values()}
        assert (32, 8) in shapes
        assert (32, 48) not in shapes
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path).eval()
        assert loaded.config.shared_expert_intermediate_size == 8


class TestStart:
    @pytest.mark.parametrize("name", ["vit", "bert", "clip"])
    def test_what_the_twin_adds_is_drawn_where_a_dense_checkpoint_has_none(self, name, tmp_path):
        tiny = TINY[name]
        tiny.make(dense=True).save_pretrained(tmp_path)
        twin, loading = tiny.model_class.from_pretrained(tmp_path, config=tiny.config(), output_loading_info=True)
        assert {".moe." in tensor for tensor in loading["missing_keys"]} == {True}
        std = 0.02 if tiny.towers else 0.2
        for block in blocks_of(twin).values():
            for tensor_name, tensor in block.named_parameters():
                assert tensor.std().item() == pytest.approx(std, rel=0.25), tensor_name

    def test_p1_s_start(self):
        model = TINY["vit"].make(head_merge_init="xavier", head_merge_bias=True, shared_expert_intermediate_size=0)
        block = blocks_of(model)["vit.layers.0.mlp.moe"]
        bound = (6 / 64) ** 0.5
        assert bound / 2**0.5 * 0.9 < block.head_layer.weight.abs().max() <= bound / 2**0.5
        assert bound * 0.9 < block.merge_layer.weight.abs().max() <= bound


def weights_of(block) -> dict:
    """Of a block, in float64, by the reference's names."""
    weights = {
        "router": {"weight": block.gate.weight},
        "head": [(block.head_layer.weight, None)],
        "merge": [(block.merge_layer.weight, None)],
        "expert_down": block.experts.down_proj,
    }
    if hasattr(block.experts, "up_proj"):
        return {**weights, "expert_up": block.experts.up_proj}
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    return {**weights, "expert_gate": gate, "expert_up": up}


class TestLayer:
    """The FFN of one layer in float64, against the papers' equations and the dense model's own FFN."""

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("name", ["vit", "dinov2-swiglu", "modernbert", "bert", "vilt", "yolos"])
    def test_output_and_gradients(self, name, shared):
        tiny = TINY[name]
        fields = {} if shared else {"shared_expert_intermediate_size": 0}
        model = tiny.make(**fields).double()
        layer = next(
            module
            for module in model.modules()
            if hasattr(getattr(module, "mlp", None), "moe") or hasattr(getattr(module, "intermediate", None), "moe")
        )
        pair = not hasattr(layer, "mlp")
        block = (layer.intermediate if pair else layer.mlp).moe
        torch.manual_seed(0)
        tokens = torch.randn(1, 3, 32, dtype=torch.float64)
        residual = torch.randn(1, 3, 32, dtype=torch.float64)

        ours = layer.output(layer.intermediate(tokens), residual) if pair else layer.mlp(tokens)
        silu = name == "dinov2-swiglu"
        routed, _ = reference.mhmoe_layer(
            tokens[0], weights_of(block), 4, 2, False, act=reference.silu if silu else ACTIVATIONS["gelu"]
        )
        if not shared:
            dense = 0
        elif pair:
            inner = ACTIVATIONS["gelu"](torch.nn.functional.linear(tokens[0], *layer.intermediate.dense.parameters()))
            dense = torch.nn.functional.linear(inner, *layer.output.dense.parameters())
        else:
            twin = type(layer.mlp)(tiny.config(dense=True)).double()
            dense = torch.func.functional_call(
                twin, {key: value for key, value in layer.mlp.named_parameters() if ".moe." not in f".{key}"}, tokens
            )[0]
        expected = dense + routed
        if pair:
            expected = expected + residual[0]
            if hasattr(layer.output, "LayerNorm"):
                expected = layer.output.LayerNorm(expected)
        torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-6)

        parameters = [*block.parameters()]
        direction = torch.randn_like(expected)
        found = torch.autograd.grad((ours[0] * direction).sum(), parameters)
        wanted = torch.autograd.grad((expected * direction).sum(), parameters)
        for one, other in zip(found, wanted, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # routers' weights are float32's


def routing_of(router_logits: tuple, keep: torch.Tensor) -> list:
    """For the reference: probabilities and choice of every sub-token that `keep` (rows,) has."""
    routing = []
    for logits in router_logits:
        for row in logits.double()[keep]:
            probabilities = row.softmax(-1)
            routing.append((list(probabilities), row.topk(2).indices.tolist()))
    return routing


class TestLosses:
    @pytest.mark.parametrize("name", ["vit", "bert", "xlm-roberta", "vilt", "vilt-pairs", "modernbert"])
    def test_the_load_balancing_loss_leaves_out_padding(self, name):
        tiny = TINY[name]
        model = tiny.make(router_aux_loss_coef=0.5)
        inputs = tiny.inputs()
        torch.manual_seed(0)
        outputs = model(**inputs, labels=tiny.labels, output_router_logits=True)
        torch.manual_seed(0)
        plain = model(**inputs, labels=tiny.labels)
        assert "aux_loss" not in plain
        torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * outputs.aux_loss)

        rows = len(outputs.router_logits[0])
        keep = torch.ones(2, rows // 2, dtype=torch.bool)
        if "attention_mask" in inputs:
            keep[:, :6] = inputs["attention_mask"].bool()
        passes = 2 if name == "vilt-pairs" else 1  # of the whole encoder, one for each picture
        assert len(outputs.router_logits) == passes * 2 * 4
        expected = [
            reference.load_balancing_loss(routing_of(outputs.router_logits[8 * i : 8 * i + 8], keep.flatten()))
            for i in range(passes)
        ]
        torch.testing.assert_close(outputs.aux_loss.double(), sum(expected) / passes, rtol=1e-5, atol=1e-5)

    def test_of_two_towers(self):
        tiny = TINY["clip"]
        model = tiny.make(router_aux_loss_coef=0.5)
        inputs = tiny.inputs()
        outputs = model(**inputs, return_loss=True, output_router_logits=True)
        vision, text = outputs.router_logits[:8], outputs.router_logits[8:]
        assert (len(text[0]), len(vision[0]), len(text)) == (12, 10, 8)
        keep = inputs["attention_mask"].bool().flatten()
        expected = reference.load_balancing_loss(routing_of(text, keep))
        expected += reference.load_balancing_loss(routing_of(vision, torch.ones(10, dtype=torch.bool)))
        torch.testing.assert_close(outputs.aux_loss.double(), expected / 2, rtol=1e-5, atol=1e-5)
        plain = model(**inputs, return_loss=True)
        torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * outputs.aux_loss)

    def test_of_patches_that_are_filled_up(self):
        tiny = TINY["siglip2"]
        inputs = tiny.inputs()
        outputs = tiny.make()(**inputs, output_router_logits=True)
        vision, text = outputs.router_logits[:8], outputs.router_logits[8:]
        masks = [inputs[name].bool().flatten() for name in ("pixel_attention_mask", "attention_mask")]
        expected = sum(
            reference.load_balancing_loss(routing_of(logits, keep))
            for logits, keep in zip((vision, text), masks, strict=True)
        )
        torch.testing.assert_close(outputs.aux_loss.double(), expected / 2, rtol=1e-5, atol=1e-5)

    def test_of_text_behind_patches(self):
        tiny = TINY["git"]
        inputs = tiny.inputs()
        outputs = tiny.make()(**inputs, output_router_logits=True)
        pictures, captions = outputs.router_logits[:8], outputs.router_logits[8:]
        assert (len(pictures[0]), len(captions[0])) == (2 * 5, 2 * (5 + 6))
        keep = torch.cat([torch.ones(2, 5, dtype=torch.bool), inputs["attention_mask"].bool()], dim=1).flatten()
        expected = reference.load_balancing_loss(routing_of(captions, keep))
        expected += reference.load_balancing_loss(routing_of(pictures, torch.ones(10, dtype=torch.bool)))
        torch.testing.assert_close(outputs.aux_loss.double(), expected / 2, rtol=1e-5, atol=1e-5)

    def test_the_z_loss(self):
        tiny = TINY["vit"]
        model = tiny.make(router_aux_loss_coef=0.0, router_z_loss_coef=0.5)
        outputs = model(**tiny.inputs(), labels=tiny.labels, output_router_logits=True)
        z = reference.z_loss([list(row.double()) for logits in outputs.router_logits for row in logits])
        plain = model(**tiny.inputs(), labels=tiny.labels)
        torch.testing.assert_close(outputs.loss.double(), plain.loss.double() + 0.5 * z)

    def test_it_keeps_its_weight_when_a_step_has_several_forwards(self):
        tiny = TINY["vit"]
        model = tiny.make(output_router_logits=True, router_aux_loss_coef=0.5)
        inputs = tiny.inputs()
        items = torch.tensor(8)
        outputs = model(**inputs, labels=tiny.labels, num_items_in_batch=items)
        plain = model(**inputs, labels=tiny.labels, num_items_in_batch=items, output_router_logits=False)
        torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * 2 / 8 * outputs.aux_loss)

    def test_there_is_none_where_all_layers_are_dense(self):
        tiny = TINY["bert"]
        model = tiny.make(mlp_only_layers=[0, 1])
        outputs = model(**tiny.inputs(), labels=tiny.labels, output_router_logits=True)
        assert "aux_loss" not in outputs
        assert torch.equal(outputs.loss, model(**tiny.inputs(), labels=tiny.labels).loss)

    @pytest.mark.parametrize("backend", ["subtoken", "batched_mm"])
    @pytest.mark.parametrize("name", ["vit", "bert"])
    def test_compiled_in_one_graph(self, name, backend):
        tiny = TINY[name]
        model = tiny.make(output_router_logits=True)
        model.set_experts_implementation(backend)
        expected = model(**tiny.inputs(), labels=tiny.labels)
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager", fullgraph=True)(**tiny.inputs(), labels=tiny.labels)
        for key in ("loss", "aux_loss", "logits"):
            torch.testing.assert_close(found[key], expected[key])

    def test_gradient_checkpointing_changes_nothing(self):
        tiny = TINY["vit"]
        gradients = []
        for checkpointed in (False, True):
            model = tiny.make(output_router_logits=True).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(**tiny.inputs(), labels=tiny.labels).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    def test_a_tuple_has_them_last(self):
        tiny = TINY["vit"]
        model = tiny.make()
        as_tuple = model(**tiny.inputs(), labels=tiny.labels, output_router_logits=True, return_dict=False)
        assert [len(part) if isinstance(part, tuple) else part.dim() for part in as_tuple] == [0, 2, 0, 8]


class TestBackends:
    @pytest.mark.parametrize("name", TINY)
    def test_all_agree(self, name):
        tiny = TINY[name]
        model = tiny.make()
        assert model.config._experts_implementation == "subtoken"
        expected = said(model, **tiny.inputs())
        atol = 1e-5 * max(1.0, expected.abs().max().item() / 10)  # a segmentation's logits are of several hundreds
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(said(model, **tiny.inputs()), expected, rtol=1e-4, atol=atol)


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_moe_heads": 5}, "num_moe_heads=5 does not divide hidden_size=32"),
            ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
            ({"mlp_only_layers": [2]}, "mlp_only_layers"),
            ({"router_type": "oracle"}, "router_type='oracle' is not known"),
            ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
        ],
    )
    @pytest.mark.parametrize("name", ["vit", "clip"])
    def test_a_config_names_the_field(self, name, fields, message):
        with pytest.raises(ValueError, match=message):
            TINY[name].config(**fields)

    def test_a_width_that_a_family_cannot_have(self):
        with pytest.raises(ValueError, match=r"shared_expert_intermediate_size=40 .* 0 or 64"):
            TINY["dinov2"].config(shared_expert_intermediate_size=40)


@pytest.mark.parametrize("name", ["vit", "bert", "clip"])
def test_a_frozen_merge_layer_of_zero_is_told(name, caplog, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    model = TINY[name].make()
    for block in blocks_of(model).values():
        torch.nn.init.zeros_(block.merge_layer.weight)
        block.merge_layer.requires_grad_(False)
    for _ in range(2):
        model(**TINY[name].inputs())
    told = [record.message for record in caplog.records if "merge_layer is zero and frozen" in record.message]
    assert len(told) == 1
    assert f"in {len(blocks_of(model))} of {len(blocks_of(model))} MH-MoE layers" in told[0]


def test_params_counts_a_saved_encoder(tmp_path, capsys):
    model = TINY["vit"].make()
    model.save_pretrained(tmp_path)
    count([str(tmp_path), "--json"])
    (counted,) = json.loads(capsys.readouterr().out).values()
    assert counted["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    experts = [parameter.numel() for key, parameter in model.named_parameters() if ".experts." in key]
    assert counted["expert_parameters"] == sum(experts)
    assert counted["ffn_multiply_adds"] == 2 * (2 * 32 * 48 + 2 * 32**2 + 2 * 32 * 2 * 16)


def test_the_fields_are_those_of_decoders():
    config = mhmoe.MHMoEViTConfig(**{name: value for name, value in MOE.items() if name != "num_moe_heads"})
    assert (config.num_moe_heads, config.num_experts, config.num_experts_per_tok) == (4, 6, 2)
    decoder = mhmoe.MHMoEConfig()
    for name in ("router_aux_loss_coef", "norm_topk_prob", "router_type", "scoring_func", "decoder_sparse_step"):
        assert getattr(config, name) == getattr(decoder, name)


def test_trainer_trains_and_adds_the_loss(tmp_path):
    tiny = TINY["vit"]
    model = tiny.make(output_router_logits=True, router_aux_loss_coef=0.1)
    before = copy.deepcopy(model.state_dict())
    rows = [{"pixel_values": picture, "labels": 2} for picture in tiny.inputs()["pixel_values"]]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if ".moe." in name)
    assert trainer.predict(rows).predictions.shape == (2, 3)  # not the router's logits


def test_a_backbone_in_a_model_that_no_twin_is_known_of(tmp_path):
    """Depth Anything, whose config holds the config of its backbone, whatever that is."""
    backbone = TINY["dinov2-backbone"].config(output_router_logits=True)
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_in_channels=8,
        head_hidden_size=4,
    )
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config).eval()
    assert type(model.backbone) is mhmoe.MHMoEDinov2Backbone
    assert len(blocks_of(model)) == 2
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(AutoModelForDepthEstimation.from_pretrained(tmp_path)).eval()
    pictures = picture()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pictures).predicted_depth, loaded(pictures).predicted_depth)


def test_captions(tmp_path):
    """GIT: one encoder reads the picture, another that and the caption; its loss has the balancing losses of both."""
    tiny = TINY["git"]
    model = tiny.make(output_router_logits=True, router_aux_loss_coef=0.5)
    inputs = tiny.inputs()
    outputs = model(**inputs, labels=tiny.labels)
    plain = model(**inputs, labels=tiny.labels, output_router_logits=False)
    torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * outputs.aux_loss)
    outputs.loss.backward()
    for block in blocks_of(model).values():
        assert block.merge_layer.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is mhmoe.MHMoEGitForCausalLM
    options = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    written = [
        captioner.eval().generate(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"][:, :1], **more)
        for captioner in (model, loaded)
        for more in (options, {**options, "use_cache": False}, {**options, "num_beams": 2})
    ]
    assert written[0].shape == (2, 4)
    assert torch.equal(written[0], written[1])
    for one, other in zip(written[:3], written[3:], strict=True):
        assert torch.equal(one, other)


def test_captions_of_two_models(tmp_path):
    """Transformers' model of two models, with a twin in each place: trained, saved, and with several beams."""
    reader, writer = TINY["vit"].make(output_router_logits=True).config, TINY["bert"].make().config
    writer.is_decoder = writer.add_cross_attention = True
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(reader, writer)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config=config)
    pictures, captions = TINY["vit"].inputs()["pixel_values"], torch.tensor([[3, 4, 5], [6, 7, 8]])
    model(pixel_values=pictures[:2], labels=captions).loss.backward()
    for tower in (model.encoder, model.decoder):
        assert blocks_of(tower)
        for block in blocks_of(tower).values():
            assert block.merge_layer.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    options = {"max_new_tokens": 3, "num_beams": 2, "decoder_start_token_id": 2, "pad_token_id": 0}
    written = [captioner.eval().generate(pictures, **options) for captioner in (model, loaded)]
    assert written[0].shape[1] == 4
    assert torch.equal(*written)


def test_layers_of_later_papers(tmp_path):
    model = TINY["vit"].make(private_experts=True, num_experts=3, moe_latent_size=16, router_input="token")
    tiny = TINY["vit"]
    outputs = model(**tiny.inputs(), labels=tiny.labels, output_router_logits=True)
    assert len(outputs.router_logits) == 8
    assert outputs.aux_loss > 0
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(type(model).from_pretrained(tmp_path)).eval()
    assert torch.equal(said(again, **tiny.inputs()), outputs.logits)


def test_commands_for_text_refuse_an_encoder(tmp_path):
    TINY["bert"].make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a mhmoe_bert is an encoder, and no causal language model"):
        load_causal_lm(tmp_path)


def test_masked_multimodal_pretraining():
    """P1's third task, as FLAVA states it: masked text, patches and both together, and pairs that belong together."""
    tiny = TINY["flava"]
    towers = {**tiny.towers, "image_config": {**tiny.towers["image_config"], "vocab_size": 16}}
    codebook = {"image_codebook_config": {"hidden_size": 8, "num_blocks_per_group": 1, "vocab_size": 16}}
    model = replace(tiny, model="MHMoEFlavaForPreTraining", towers=towers, fields={**tiny.fields, **codebook}).make(
        router_aux_loss_coef=0.5
    )
    inputs = {
        **tiny.inputs(),
        "input_ids_masked": tokens()["input_ids"].where(MASKED.eq(-100), 3),
        "mlm_labels": MASKED,
        "codebook_pixel_values": torch.randn(2, 3, 16, 16),
        "bool_masked_pos": torch.tensor([[[0, 1], [1, 0]], [[1, 0], [0, 0]]]),
        "itm_labels": torch.tensor([1, 0]),
        "return_loss": True,
    }
    outputs = model(**inputs, output_router_logits=True)
    losses = outputs.loss_info
    assert min(losses.mmm_text, losses.mmm_image, losses.itm, losses.global_contrastive) > 0
    torch.testing.assert_close(outputs.loss, model(**inputs).loss + 0.5 * outputs.aux_loss)
    outputs.loss.backward()
    for block in blocks_of(model).values():
        assert all(parameter.grad is not None for parameter in block.parameters())
