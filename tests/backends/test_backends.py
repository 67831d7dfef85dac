"""The experts backend "subtoken": against the float64 reference, eager experts, and what it must refuse."""

import threading
import time

import pytest
import reference
import torch
from expert_modules import (
    EXPERTS,
    INNER,
    TOLERANCE,
    WIDTH,
    InterleavedExperts,
    TransposedExperts,
    TwoMatrixExperts,
    assert_near,
    inputs,
    make,
    run,
)
from tiny import tiny_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mhmoe.backends.activations import FUNCTIONS
from mhmoe.backends.cpu import choices, memory, workers
from mhmoe.backends.cpu import experts as cpu
from mhmoe.backends.cpu.tuning import CHUNK_ROWS as CHUNK
from mhmoe.modeling_mhmoe.experts import MHMoEExperts, MHMoETwoMatrixExperts


@use_experts_implementation(has_bias=True)
class BiasedExperts(TwoMatrixExperts):
    pass


WAYS = [
    "one thread",
    "three threads",
    "three threads, little work",
    "three threads, no OpenMP",
    "three threads, all experts at once",
]


@pytest.fixture(params=WAYS)
def threads(request, monkeypatch):
    """However little there is to do here, threads share it, but for the last cases; and memory is used again."""
    monkeypatch.setattr(memory, "LARGE_BYTES", 16)
    if request.param != "three threads, all experts at once":
        monkeypatch.setattr(choices, "SMALL_MATRIX", 0)
    if request.param != "three threads, little work":
        monkeypatch.setattr(workers, "QUICK_MULTIPLY_ADDS", 0)
    if request.param == "three threads, no OpenMP":
        monkeypatch.setattr(workers, "OPENMP", None)
    before = torch.get_num_threads()
    number = 1 if request.param == "one thread" else 3
    torch.set_num_threads(number)
    yield number
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 90, 2 * CHUNK + 30])
def test_as_the_reference(rows, dtype, threads):
    """Few rows and several blocks of them; the reference is in float64 and goes row by row."""
    hidden_states, index, weights = inputs(rows, dtype)
    experts = make(dtype=dtype)
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in experts.named_parameters()}

    def row_by_row(hidden_states, index, weights):
        outputs = []
        for row, ids in enumerate(index.tolist()):
            terms = [
                weights[row, slot]
                * reference.ffn(
                    hidden_states[row],
                    exact["gate_up_proj"][expert, :INNER],
                    exact["gate_up_proj"][expert, INNER:],
                    exact["down_proj"][expert],
                    reference.silu,
                    reference.product,
                )
                for slot, expert in enumerate(ids)
            ]
            outputs.append(sum(terms))
        return torch.stack(outputs)

    expected = run(make(dtype=torch.float64), hidden_states.double(), index, weights.double(), row_by_row)
    expected |= {name: leaf.grad for name, leaf in exact.items()}
    actual = run(experts, hidden_states, index, weights)
    assert all(value.dtype == dtype for value in actual.values())
    assert_near(actual, expected, TOLERANCE[dtype])


def test_an_expert_in_pieces_among_small_ones(threads):
    """Of 42 experts one has so many rows that they are divided, next to many of one row in the same chunk."""
    loads = torch.tensor([1] * 40 + [257, 215])
    index = torch.arange(42).repeat_interleave(loads)[:, None]
    hidden_states, _, _ = inputs(len(index))
    arguments = (hidden_states, index, torch.ones(len(index), 1))
    expected = run(make(implementation="eager", num_experts=42), *arguments)
    experts = make(num_experts=42)
    assert_near(run(experts, *arguments), expected, 1e-5)
    with torch.no_grad():
        assert_near({"output": experts(*arguments)}, {"output": expected["output"]}, 1e-5)


def test_gradients_are_those_of_small_differences(threads):
    experts = make(dtype=torch.float64)
    hidden_states, index, weights = inputs(8, torch.float64)
    leaves = [hidden_states, weights, *(parameter.detach() for parameter in experts.parameters())]

    def forward(hidden_states, weights, gate_up_proj, down_proj):
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(experts, parameters, (hidden_states, index, weights))

    assert torch.autograd.gradcheck(forward, [leaf.clone().requires_grad_() for leaf in leaves], fast_mode=True)


@pytest.mark.parametrize("experts_class", [TwoMatrixExperts, TransposedExperts, InterleavedExperts])
@pytest.mark.parametrize("rows", [3, 90])
def test_other_layouts(experts_class, rows, threads):
    expected = run(make(experts_class, implementation="eager"), *inputs(rows))
    assert_near(run(make(experts_class), *inputs(rows)), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("experts_class", [MHMoEExperts, MHMoETwoMatrixExperts])
@pytest.mark.parametrize(
    "activation", ["gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "mish", "relu2"]
)
def test_other_activations(activation, experts_class, threads):
    expected = run(make(experts_class, hidden_act=activation, implementation="eager"), *inputs(90))
    actual = run(make(experts_class, hidden_act=activation), *inputs(90))
    assert_near(actual, expected, TOLERANCE[torch.float32])


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="grouped_mm"):
        make(BiasedExperts)(*inputs(3))
    experts = make()
    experts.scale = nn.Parameter(torch.ones(()))  # which no formula here would take in
    with pytest.raises(ValueError, match="scale of MHMoEExperts"):
        experts(*inputs(3))


def test_refuses_parameters_of_modules_inside():
    experts = make()
    experts.norm = nn.LayerNorm(WIDTH)
    with pytest.raises(ValueError, match=r"norm\.weight, norm\.bias of MHMoEExperts"):
        experts(*inputs(3))


class Doubled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((), 2.0))

    def forward(self, weight):
        return self.factor * weight


def parametrized(experts):
    for name in ("gate_up_proj", "down_proj"):
        parametrize.register_parametrization(experts, name, Doubled())


def pruned(experts):
    prune.l1_unstructured(experts, "down_proj", 0.5)


def weight_normed(experts):
    nn.utils.parametrizations.weight_norm(experts, "gate_up_proj")


@pytest.mark.parametrize("change", [parametrized, pruned, weight_normed])
@pytest.mark.parametrize("rows", [3, 90])
def test_weights_are_what_they_effectively_are(change, rows, threads):
    results = {}
    for implementation in ("eager", "subtoken"):
        experts = make(implementation=implementation)
        change(experts)
        results[implementation] = run(experts, *inputs(rows))
        with torch.no_grad():
            results[implementation]["without gradients"] = experts(*inputs(rows))
    assert_near(results["subtoken"], results["eager"], 1e-5)
    assert not torch.equal(results["eager"]["output"], make()(*inputs(rows)))


@pytest.mark.parametrize("change", [parametrized, pruned])
def test_refuses_what_it_does_not_know_beside_effective_weights(change):
    experts = make()
    change(experts)
    experts.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="does not know scale of"):
        experts(*inputs(3))
    parametrize.register_parametrization(experts, "scale", Doubled())
    with pytest.raises(ValueError, match=r"does not know parametrizations\.scale"):
        experts(*inputs(3))


class TestWithoutNumbers:
    """Where no path may depend on a routing, and where more than autograd follows the operators."""

    def test_meta(self):
        experts = make().to("meta")
        arguments = [tensor.to("meta") for tensor in inputs(7)]
        arguments[0].requires_grad_()
        output = experts(*arguments)
        output.sum().backward()
        assert output.shape == arguments[0].grad.shape == (7, WIDTH)
        assert experts.down_proj.grad.device.type == "meta"

    def test_fake(self):
        experts, arguments = make(), inputs(7)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = experts(*(mode.from_tensor(tensor) for tensor in arguments))
        assert output.shape == (7, WIDTH)

    def test_exported(self):
        experts = make()
        rows = {0: torch.export.Dim("rows")}
        program = torch.export.export(experts, inputs(7), dynamic_shapes=(rows, rows, rows))
        assert_near({"output": program.module()(*inputs(20))}, {"output": experts(*inputs(20))}, 1e-6)

    def test_traced(self):
        hidden_states, index, weights = inputs(20)
        experts = make()
        traced = torch.jit.trace(experts, (hidden_states, index, weights), check_trace=False)
        arguments = hidden_states, index.flip(0), weights
        assert_near({"output": traced(*arguments)}, {"output": experts(*arguments)}, 1e-6)

    def test_vmap(self):
        experts = make()
        batches = [torch.stack([tensor, tensor.flip(0)]) for tensor in inputs(7)]
        expected = torch.stack([experts(*arguments) for arguments in zip(*batches, strict=True)])
        assert_near({"output": torch.func.vmap(experts)(*batches)}, {"output": expected}, 1e-6)

    def test_derivatives_of_torch_func(self):
        experts = make(dtype=torch.float64)
        hidden_states, index, weights = inputs(7, torch.float64)
        parameters = {name: parameter.detach() for name, parameter in experts.named_parameters()}

        def loss(parameters, hidden_states):
            output = torch.func.functional_call(experts, parameters, (hidden_states, index, weights))
            return output.square().sum()

        grads = torch.func.grad(loss)(parameters, hidden_states)
        experts(hidden_states, index, weights).square().sum().backward()
        assert_near(grads, {name: parameter.grad for name, parameter in experts.named_parameters()}, 1e-12)
        tangent = torch.ones_like(hidden_states)
        _, expected = torch.func.jvp(lambda rows: loss(parameters, rows), (hidden_states,), (tangent,))
        with forward_ad.dual_level(), torch.no_grad():
            dual = loss(parameters, forward_ad.make_dual(hidden_states, tangent))
            assert_near({"tangent": forward_ad.unpack_dual(dual).tangent}, {"tangent": expected}, 1e-12)


def test_forward_hooks_see_inputs_and_output(threads):
    experts, seen = make(), []
    experts.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    arguments = inputs(90)
    output = experts(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], (*arguments, output), strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_other_models_take_it(family, threads, monkeypatch):
    calls = []
    experts = cpu.experts
    monkeypatch.setattr(cpu, "experts", lambda problem: calls.append(problem) or experts(problem))
    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    results = {}
    for implementation in ("eager", "subtoken"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results[implementation] = {"logits": output.logits.detach()}
        results[implementation] |= {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert len(calls) == 2  # layers
    assert_near(results["subtoken"], results["eager"], 1e-4)


def test_experts_of_another_process(threads):
    """Ids from the number of experts on add nothing and take no gradient, whatever their weights."""
    hidden_states, index, weights = inputs(90)
    here = index != 3
    results = run(make(), hidden_states, torch.where(here, index, EXPERTS), weights)
    expected = run(make(), hidden_states, index, weights * here)
    assert not results["weights"][~here].any()
    expected["weights"] = expected["weights"] * here
    assert_near(results, expected, TOLERANCE[torch.float32])
    nowhere = run(make(), hidden_states, torch.full_like(index, EXPERTS), weights)
    assert not any(value.any() for value in nowhere.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows(dtype, threads):
    results = run(make(dtype=dtype), *inputs(0, dtype))
    assert results["output"].shape == (0, WIDTH)
    assert not results["gate_up_proj"].any()
    assert not results["down_proj"].any()


@pytest.mark.parametrize("frozen", ["input", "weights", "gate_up_proj", "down_proj"])
def test_frozen_tensors(frozen, threads):
    """Whichever gets no gradient, the others get theirs."""
    expected = run(make(), *inputs(90))
    hidden_states, index, weights = inputs(90)
    experts = make()
    leaves = {"input": hidden_states, "weights": weights, **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    output = experts(hidden_states, index, weights)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(9)))
    assert leaves[frozen].grad is None
    actual = {name: leaf.grad for name, leaf in leaves.items() if name != frozen}
    expected = {name: value for name, value in expected.items() if name in actual}
    assert_near(actual, expected, 1e-6)


def test_without_gradients(threads):
    experts = make()
    expected = experts(*inputs(90))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = experts(*inputs(90))
        assert not output.requires_grad
        assert torch.equal(output, expected)
    with torch.inference_mode():
        made_inside = make()(*inputs(90))
    assert torch.equal(made_inside, expected)


def test_every_run_gives_the_same_bits(threads):
    first, second = run(make(), *inputs(700)), run(make(), *inputs(700))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_inputs(threads):
    hidden_states, index, weights = inputs(90)
    expected = make()(hidden_states, index, weights)
    strided = hidden_states.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_near(run(make(), *strided), run(make(), hidden_states, index, weights), 1e-6)
    experts = make()
    experts(*strided).sum().backward()  # whose gradient is one number, expanded
    other = make()
    other(hidden_states, index, weights).backward(torch.ones_like(expected))
    assert torch.equal(experts.down_proj.grad, other.down_proj.grad)


def test_second_derivatives_are_refused():
    hidden_states, index, weights = inputs(7)
    hidden_states.requires_grad_()
    (gradient,) = torch.autograd.grad(make()(hidden_states, index, weights).sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, threads):
    experts = make()
    expected = run(experts, *inputs(90))
    actual = run(experts, *inputs(90), lambda *args: checkpoint(experts, *args, use_reentrant=use_reentrant))
    assert_near(actual, expected, 0)


def test_two_backward_passes(threads):
    hidden_states, index, weights = inputs(90)
    hidden_states.requires_grad_()
    output = make()(hidden_states, index, weights).square().sum()
    first, second = (torch.autograd.grad(output, hidden_states, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_multiplies_in_its_dtype(threads):
    experts, low = make(), make(dtype=torch.bfloat16)
    arguments = inputs(90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(experts, *arguments)
    assert all(value.dtype == torch.float32 for value in actual.values())
    lowered = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in arguments)
    expected = low(*lowered)
    # the rounding of bfloat16 shows that the products were in it
    assert torch.equal(actual["output"].bfloat16(), expected)
    assert_near(actual, run(experts, *arguments), TOLERANCE[torch.bfloat16])


def test_products_are_in_the_dtype_of_the_weights(threads):
    hidden_states, index, weights = inputs(90)
    output = make(dtype=torch.bfloat16)(hidden_states, index, weights)
    assert output.dtype == torch.float32
    expected = make(dtype=torch.bfloat16)(hidden_states.bfloat16(), index, weights.bfloat16())
    assert torch.equal(output.bfloat16(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [*FUNCTIONS])
@pytest.mark.parametrize("experts_class", [MHMoEExperts, MHMoETwoMatrixExperts])
def test_compiled_in_one_graph(experts_class, activation, dtype, threads):
    torch._dynamo.reset()  # whose graphs of other tests count towards a limit
    experts = make(experts_class, dtype, hidden_act=activation)
    expected = run(experts, *inputs(90, dtype))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_near(run(experts, *inputs(90, dtype), compiled), expected, TOLERANCE[dtype] / 10)
    with torch.no_grad():
        assert_near({"output": compiled(*inputs(90, dtype))}, {"output": expected["output"]}, TOLERANCE[dtype] / 10)
    experts.requires_grad_(False)
    hidden_states, index, weights = inputs(90, dtype)
    compiled(hidden_states.requires_grad_(), index, weights).sum().backward()
    assert hidden_states.grad.any()


def test_compiled_with_a_break_around_other_functions(threads):
    torch._dynamo.reset()  # whose graphs of other tests count towards a limit
    experts = make(hidden_act="mish")
    expected = run(experts, *inputs(90))
    assert_near(run(experts, *inputs(90), torch.compile(experts, backend="aot_eager")), expected, 0)


def test_whole_model_generates_the_same(threads):
    model = tiny_model(num_moe_heads=4)
    prompt = torch.tensor([[5, 6, 7, 8]])
    texts = {}
    for implementation in ("eager", "subtoken"):
        model.set_experts_implementation(implementation)
        texts[implementation] = model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
    assert texts["subtoken"] == texts["eager"]


class TestWorkers:
    def test_every_task_is_done_once_by_single_threads(self, threads):
        done, sizes, makers = [], set(), []

        def make_task():
            makers.append(threading.get_ident())

            def task(index):
                time.sleep(0.001)  # so that every thread gets some
                done.append(index)
                sizes.add(torch.get_num_threads())

            return task

        workers.run(make_task, [workers.QUICK_MULTIPLY_ADDS + 1] * 50)
        assert sorted(done) == list(range(50))
        assert len(makers) == len(set(makers)) == (threads if workers.OPENMP else 1)
        assert sizes == {1 if workers.OPENMP else threads}
        assert torch.get_num_threads() == threads

    def test_errors_reach_the_caller(self, threads):
        def task(index):
            raise RuntimeError("in a task")

        with pytest.raises(RuntimeError, match="in a task"):
            workers.run(lambda: task, [workers.QUICK_MULTIPLY_ADDS + 1] * 5)

    def test_new_threads_of_the_process_keep_its_number(self, threads):
        workers.run(lambda: lambda index: None, [workers.QUICK_MULTIPLY_ADDS + 1] * 5)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [threads]


def test_registered_under_its_name():
    assert "subtoken" in ALL_EXPERTS_FUNCTIONS
