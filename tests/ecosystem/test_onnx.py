"""ONNX and torch.export of the default model by the default call, run by ONNX Runtime."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from mhmoe import MHMoEForSequenceClassification


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def run(program, folder, **inputs: torch.Tensor) -> np.ndarray:
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def assert_near(actual: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"gated_mlp": False, "router_type": "xmoe"}], ids=["default", "variants"])
def test_the_default_call(fields, tmp_path):
    model = tiny_model(shared_expert_intermediate_size=32, **fields)
    assert model.config._experts_implementation == "subtoken"
    program = torch.onnx.export(model, (IDS,), dynamo=True, verbose=False)
    assert_near(run(program, tmp_path, input_ids=IDS), model(IDS).logits)


def test_inputs_of_other_sizes(tmp_path):
    model = tiny_model()
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    program = torch.onnx.export(
        model, kwargs=inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), dynamo=True, verbose=False
    )
    others = {"input_ids": IDS[:1, :7], "attention_mask": torch.ones_like(IDS[:1, :7])}
    assert_near(run(program, tmp_path, **others), model(**others).logits)


def test_other_heads(tmp_path):
    model = MHMoEForSequenceClassification(tiny_model().config).eval()
    program = torch.onnx.export(model, (IDS,), dynamo=True, verbose=False)
    assert_near(run(program, tmp_path, input_ids=IDS), model(IDS).logits)


def test_torch_export():
    model = tiny_model()
    exported = torch.export.export(model, (IDS,)).module()
    torch.testing.assert_close(exported(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
