"""The Triton experts, in Triton's interpreter where there is no GPU, at tiny sizes, against eager experts."""

import pytest
import torch
from expert_modules import EXPERTS, TwoMatrixExperts, assert_near, inputs, make, run
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mhmoe.backends.triton import tiles


pytest.importorskip("triton")

from mhmoe.backends.triton import experts as gpu


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.004}  # of the largest


def on_device(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in inputs(rows, dtype))


def make_experts(*args, implementation: str = "subtoken_triton", **kwargs) -> nn.Module:
    return make(*args, implementation=implementation, **kwargs).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_as_eager_experts(rows, dtype):
    """Few rows, and for expert 3 several blocks of them; expert 1 has none."""
    hidden_states, index, weights = on_device(rows, dtype)
    expected = run(make_experts(implementation="eager"), hidden_states.float(), index, weights.float())
    actual = run(make_experts(dtype=dtype), hidden_states, index, weights)
    assert all(value.dtype == dtype for value in actual.values())
    assert_near(actual, expected, TOLERANCE[dtype])


def test_experts_wider_than_a_block():
    fields = {"hidden_size": 2 * 72, "moe_intermediate_size": 80}
    arguments = tuple(tensor.to(DEVICE) for tensor in inputs(20, width=72))
    expected = run(make_experts(implementation="eager", **fields), *arguments)
    assert_near(run(make_experts(**fields), *arguments), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("average", tiles.TILES_16_BIT)
def test_large_blocks(average, monkeypatch):
    """Which only many rows per expert would bring; the last block of columns is not full."""
    monkeypatch.setattr(tiles, "TILES_16_BIT", {0: tiles.TILES_16_BIT[average]})
    fields = {"hidden_size": 2 * 72, "moe_intermediate_size": 144}
    hidden_states, index, weights = (tensor.to(DEVICE) for tensor in inputs(300, torch.float16, width=72))
    expected = run(make_experts(implementation="eager", **fields), hidden_states.float(), index, weights.float())
    actual = run(make_experts(dtype=torch.float16, **fields), hidden_states, index, weights)
    assert_near(actual, expected, TOLERANCE[torch.float16])


def test_experts_of_another_process():
    hidden_states, index, weights = on_device(60)
    here = index != 3
    experts = make_experts()
    experts._is_expert_parallel = True
    results = run(experts, hidden_states, torch.where(here, index, EXPERTS), weights)
    expected = run(make_experts(implementation="eager"), hidden_states, index, weights * here)
    assert not results["weights"][~here].any()
    expected["weights"] = expected["weights"] * here
    assert_near(results, expected, TOLERANCE[torch.float32])


def test_no_rows():
    results = run(make_experts(), *on_device(0))
    assert results["output"].shape == inputs(0)[0].shape
    assert not results["gate_up_proj"].any()


def test_without_gradients_and_with_frozen_experts():
    experts = make_experts()
    expected = run(experts, *on_device(20))
    with torch.no_grad():
        assert torch.equal(experts(*on_device(20)), expected["output"])
    experts.requires_grad_(False)
    hidden_states, index, weights = on_device(20)
    output = experts(hidden_states.requires_grad_(), index, weights)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE))
    assert_near({"input": hidden_states.grad}, {"input": expected["input"]}, 1e-6)


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="choose grouped_mm"):
        make_experts(hidden_act="gelu")(*on_device(3))
    with pytest.raises(ValueError, match="choose grouped_mm"):
        make_experts(TwoMatrixExperts)(*on_device(3))


def test_second_derivatives_are_refused():
    hidden_states, index, weights = on_device(3)
    hidden_states.requires_grad_()
    (gradient,) = torch.autograd.grad(
        make_experts()(hidden_states, index, weights).sum(), hidden_states, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compiled_in_one_graph(dtype):
    experts = make_experts(dtype=dtype)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_near(run(experts, *on_device(90, dtype), compiled), run(experts, *on_device(90, dtype)), 0)
    with torch.no_grad():
        assert torch.equal(compiled(*on_device(90, dtype)), experts(*on_device(90, dtype)))
    experts.requires_grad_(False)
    hidden_states, index, weights = on_device(90, dtype)
    compiled(hidden_states.requires_grad_(), index, weights).sum().backward()
    assert hidden_states.grad.any()


def test_compiled_for_any_number_of_rows():
    """One graph for all numbers of rows whose blocks are equally large."""
    experts = make_experts()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    run(experts, *on_device(30), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (41, 90):
            assert_near(run(experts, *on_device(rows), compiled), run(experts, *on_device(rows)), 0)


def test_autocast():
    """In autocast's dtype, and gradients in the parameters'."""
    experts = make_experts()
    arguments = on_device(20)
    expected = run(experts, *arguments)
    with torch.autocast(DEVICE, torch.float16):
        actual = run(experts, *arguments)
    assert all(actual[name].dtype == value.dtype for name, value in expected.items())
    assert not torch.equal(actual["output"], expected["output"])
    assert_near(actual, expected, TOLERANCE[torch.float16])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_cuda_graph():
    """And replayed on other numbers, and another routing."""
    experts = make_experts().requires_grad_(False)
    held = [tensor.clone() for tensor in on_device(90)]
    experts(*held)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = experts(*held)
    hidden_states, index, weights = on_device(90)
    for tensor, value in zip(held, (hidden_states * 2, index.flip(0), weights.flip(0)), strict=True):
        tensor.copy_(value)
    graph.replay()
    assert torch.equal(output, experts(*held))


def test_operators_are_what_they_say():
    """Their shapes and strides without numbers, for torch.compile, among others."""
    hidden_states, index, weights = on_device(20)
    experts = make_experts()
    parameters = experts.gate_up_proj.detach(), experts.down_proj.detach()
    routing = gpu.route(index, EXPERTS, torch.float32)
    arguments = (hidden_states, *parameters, weights, *routing, True, False)
    output, first = gpu.forward(*arguments)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gpu._experts, arguments, test_utils=checks)
    for needs in ([True] * 4, [True, False, False, True]):
        arguments = (output, hidden_states, *parameters, weights, first, *routing, False, needs)
        torch.library.opcheck(gpu._experts_backward, arguments, test_utils=checks)


def test_registered_under_its_name():
    assert "subtoken_triton" in ALL_EXPERTS_FUNCTIONS
