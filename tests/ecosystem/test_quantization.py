"""Quantized experts: bytes, outputs, saving, training around them; and one line where they stay as they are."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from mhmoe.modeling_mhmoe.experts import SubTokenExperts


IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
FIELDS = {"hidden_size": 128, "num_experts": 8, "moe_intermediate_size": 32}


def torchao(name: str = "Int8WeightOnlyConfig", **options) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(), **options)


def bitsandbytes(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


KINDS = {  # how to make a config, bytes of an expert's number, largest share of the largest logit that is lost
    "torchao int8": (torchao, 1.0, 0.1),
    "torchao float8": (lambda: torchao("Float8WeightOnlyConfig"), 1.0, 0.15),
    "int8": (lambda: bitsandbytes(load_in_8bit=True), 1.0, 0.15),
    "nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.5, 0.5),
    "fp4": (lambda: bitsandbytes(load_in_4bit=True), 0.5, 0.5),
}


def nbytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def experts_of(model: nn.Module) -> list[SubTokenExperts]:
    return [module for module in model.modules() if isinstance(module, SubTokenExperts)]


def size(model: nn.Module) -> int:
    """Bytes of the experts."""
    return sum(
        nbytes(tensor) for experts in experts_of(model) for tensor in (*experts.parameters(), *experts.buffers())
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(params=[True, False], ids=["gated", "two matrices"])
def source(request, tmp_path):
    model = tiny_model(**FIELDS, gated_mlp=request.param)
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_quantized_too(kind, source, tmp_path):
    model, folder = source
    config, width, loss = KINDS[kind]
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())
    numbers = sum(parameter.numel() for experts in experts_of(model) for parameter in experts.parameters())
    assert width * numbers <= size(quantized) <= 1.15 * width * numbers + 4 * numbers / 32
    # before the first forward, in which bitsandbytes repacks linear layers in 4 bits on some CPUs, and rounds scales
    quantized.save_pretrained(tmp_path / "saved")
    expected = logits(quantized)
    assert 0 < (expected - logits(model)).abs().max() <= loss * logits(model).abs().max()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert size(again) == size(quantized)
    assert torch.equal(logits(again), expected)
    for implementation in ("eager", "batched_mm"):
        again.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=0)
    again.set_experts_implementation("subtoken")
    assert again.generate(IDS[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_is_near_what_it_was(kind, source):
    model, folder = source
    config, width, _ = KINDS[kind]
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())
    for experts, held in zip(experts_of(model), experts_of(quantized), strict=True):
        for name in experts.matrices:
            weight, restored = getattr(experts, name).detach(), held.restored(name, torch.float32)
            assert restored.shape == weight.shape
            error = (restored - weight).norm() / weight.norm()
            assert 0 < error < (0.03 if width == 1 else 0.15)


def test_an_odd_number_of_weights(tmp_path):
    odd = {"hidden_size": 12, "num_attention_heads": 2, "num_moe_heads": 4, "num_experts": 5, "gated_mlp": False}
    model = tiny_model(**odd, moe_intermediate_size=7)
    model.save_pretrained(tmp_path)
    config = bitsandbytes(
        load_in_4bit=True, llm_int8_skip_modules=["self_attn", "head_layer", "merge_layer", "lm_head"]
    )
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for experts, held in zip(experts_of(model), experts_of(quantized), strict=True):
        assert (held.restored("up_proj", torch.float32) - experts.up_proj).norm() < 0.2 * experts.up_proj.norm()


def test_only_what_is_trained_gets_gradients(source):
    _, folder = source
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bitsandbytes(load_in_4bit=True))
    model.model.norm.weight.requires_grad_()
    model(IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert "model.norm.weight" in trained
    assert not any("experts" in name for name in trained)
    gradient = model.model.layers[0].input_layernorm.weight.grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("torchao int8", r"experts\.down_proj, which is quantized and cannot be adapted"),
        ("nf4", "no `target_parameters` found"),  # PEFT's own, since nothing is a parameter there
    ],
)
def test_adapters_beside_quantized_experts_and_not_on_them(kind, refusal, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model(**FIELDS).save_pretrained(tmp_path)

    def adapted(**options):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KINDS[kind][0]())
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))

    model = adapted()
    model(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)
    with pytest.raises(ValueError, match=refusal):
        adapted(target_modules=[], target_parameters=["mlp.experts.down_proj"])(IDS)


@pytest.mark.parametrize("kind", ["torchao int8", "int8", "nf4"])
def test_quantized_experts_are_not_trained_whole(kind, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model(**FIELDS).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KINDS[kind][0]())
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["experts"]))
    with pytest.raises(ValueError, match=r"modules_to_save has model\.layers\.0\.mlp\.experts, which is quantized"):
        model(IDS)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_dequantize_restores_experts_too(kind, source, tmp_path):
    model, folder = source
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind][0]())
    expected = [
        experts.restored(name, torch.float32) for experts in experts_of(quantized) for name in experts.matrices
    ]
    quantized.dequantize()
    assert size(quantized) == size(model)
    actual = [getattr(experts, name) for experts in experts_of(quantized) for name in experts.matrices]
    assert all(torch.equal(weight, restored) for weight, restored in zip(actual, expected, strict=True))
    quantized(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for experts in experts_of(quantized) for parameter in experts.parameters())
    quantized.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(quantized))


def test_modules_that_are_to_stay_stay(source):
    model, folder = source
    config = torchao(modules_to_not_convert=["experts"])
    assert size(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)) == size(model)
    config = bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["experts"])
    assert size(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)) == size(model)


@pytest.fixture
def told(monkeypatch):
    told = []
    monkeypatch.setattr("mhmoe.modeling_mhmoe.quantization.logger.warning", told.append)
    return told


def test_quanto_leaves_experts_and_the_load_says_so(source, told):
    pytest.importorskip("optimum.quanto")
    model, folder = source
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig("int8"))
    assert size(quantized) == size(model)
    (line,) = told
    assert line.startswith("quantization_config of quanto: it takes linear layers alone, so the experts of 2 layers")
    assert "\n" not in line


def test_a_config_of_torchao_that_takes_no_experts(source, told):
    model, folder = source
    quantized = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao("IntxWeightOnlyConfig"))
    assert size(quantized) == size(model)
    assert "IntxWeightOnlyConfig does not take them" in told[0]
    assert "experts of 2 layers stay in float32" in told[0]
    assert len(told) == 1


def test_rules_of_torchao_that_name_no_experts(source, told, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.FqnToConfig({"_default": quantization.Int8WeightOnlyConfig()}))
    quantized = AutoModelForCausalLM.from_pretrained(source[1], quantization_config=config)
    assert size(quantized) == size(source[0])
    quantized.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert r"no rule of FqnToConfig is theirs, as 're:.*\.experts\.\w+_proj' would be" in told[0]
    assert "the folder holds them unquantized, so the experts of 2 layers stay in float32" in told[1]


def test_rows_of_no_whole_blocks(tmp_path, told):
    """On a CPU bitsandbytes itself fails with them, in linear layers."""
    model = tiny_model(**FIELDS, shared_expert_intermediate_size=96)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes(load_in_4bit=True))
    (line,) = told
    assert line.startswith("shared_expert.down_proj: in_features is no multiple of 64")
    skipped = ["lm_head", "shared_expert.down_proj"]
    config = bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=skipped)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(told) == 1
    assert logits(quantized).isfinite().all()


def test_float8_makes_nan_of_zeros(tmp_path, told):
    """As torchao 0.18 does. Conversions have such rows."""
    model = tiny_model(**FIELDS)
    for experts in experts_of(model):
        experts.down_proj.data[0, 0] = 0
    model.save_pretrained(tmp_path)
    config = torchao("Float8WeightOnlyConfig")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert logits(quantized).isfinite().all()
    assert size(quantized) < size(model) or "it makes NaN of them" in told[0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_where_experts_are_quantized(kind, source, told):
    AutoModelForCausalLM.from_pretrained(source[1], quantization_config=KINDS[kind][0]())
    assert not told


def test_by_torchao_itself(source):
    """`quantize_` takes linear layers unless it is told more; the default backend takes what it makes of experts."""
    quantization = pytest.importorskip("torchao.quantization")
    model, _ = source
    quantized = copy.deepcopy(model)
    rules = {r"re:.*\.experts\.\w+_proj": quantization.Int8WeightOnlyConfig()}
    quantization.quantize_(quantized, quantization.FqnToConfig(rules), filter_fn=None)
    assert size(quantized) < 0.3 * size(model)
    torch.testing.assert_close(logits(quantized), logits(model), atol=0.1 * logits(model).abs().max().item(), rtol=0)


def test_bitnet_is_refused(tmp_path):
    tiny_model(use_bitnet=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use_bitnet=True and quantization_config of bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bitsandbytes(load_in_4bit=True))
