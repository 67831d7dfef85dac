"""The experts in C: against the float64 reference, what they leave to others, and how they are compiled."""

import dataclasses
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from expert_modules import (
    TOLERANCE,
    InterleavedExperts,
    TransposedExperts,
    TwoMatrixExperts,
    assert_near,
    inputs,
    make,
)
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from mhmoe.backends.activations import FUNCTIONS, OTHER_NAMES, ModuleActivation, name_of, named
from mhmoe.backends.cpu import compiled, memory, native
from mhmoe.backends.cpu import experts as cpu
from mhmoe.backends.cpu.native import LEAST, STEP
from mhmoe.backends.problem import Problem


needs_compiler = pytest.mark.skipif(torch.float32 not in native.dtypes(), reason="no C compiler")
DTYPES = [
    pytest.param(dtype, id=str(dtype), marks=pytest.mark.skipif(dtype not in native.dtypes(), reason="not in C here"))
    for dtype in native.BITS
]


SWIGLU = named("silu", gated=True)
NAMES = "hidden_states", "first_proj", "down_proj", "top_k_weights"  # in the order of `Problem.differentiable`


class Subclass(torch.Tensor):
    """As those of distributed or quantized tensors."""


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def calls(request, monkeypatch):
    """Wherever C can compute experts, it does; returns the problems that it has computed."""
    problems, run = [], native._run
    monkeypatch.setattr(cpu, "native_pays", lambda *_, **__: True)
    monkeypatch.setattr(
        native, "_run", lambda problem, *args, **more: problems.append(problem) or run(problem, *args, **more)
    )
    monkeypatch.setattr(memory, "LARGE_BYTES", 16)  # work space is used again
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield problems
    torch.set_num_threads(before)


def example(
    loads: list[int],
    width: int,
    inner: int,
    dtype: torch.dtype,
    top_k: int = 1,
    elsewhere: int = 0,
    activation: ModuleActivation = SWIGLU,
) -> Problem:
    """Experts with these loads, and `elsewhere` rows of experts that other processes have, in random order."""
    generator = torch.Generator().manual_seed(sum(loads) + width)
    ids = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    ids = torch.cat([ids, torch.full((elsewhere,), len(loads) + 2)])
    index = ids[torch.randperm(len(ids), generator=generator)].view(-1, top_k)
    return Problem(
        torch.randn(len(index), width, generator=generator).to(dtype),
        (torch.randn(len(loads), (1 + activation.gated) * inner, width, generator=generator) * width**-0.5).to(dtype),
        (torch.randn(len(loads), width, inner, generator=generator) * inner**-0.5).to(dtype),
        torch.rand(index.shape, generator=generator).to(dtype),
        index,
        activation,
        dtype,
        partial=elsewhere > 0,
    )


def reference(problem: Problem) -> torch.Tensor:
    """In float64, one row after the other."""
    hidden_states, first_proj, down_proj, weights = (tensor.double() for tensor in problem.differentiable)
    outputs = []
    for token, ids in enumerate(problem.top_k_index.tolist()):
        output = torch.zeros_like(hidden_states[0])
        for slot, expert in enumerate(ids):
            if expert < problem.num_experts:
                first, function = first_proj[expert] @ hidden_states[token], ACT2FN[problem.activation.name]
                gate, up = first.chunk(2) if problem.activation.gated else (first, 1)
                inner = function(gate) * up
                output = output + weights[token, slot] * (down_proj[expert] @ inner)
        outputs.append(output)
    return torch.stack(outputs)


def forgetting(run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`run`, after which C does not pay any more."""

    def then_forget(*args, **more):
        run(*args, **more)
        monkeypatch.setattr(compiled, "native_pays", lambda *_, **__: False)

    return then_forget


def gradients(problem: Problem, function: Callable[[Problem], torch.Tensor], needed=NAMES) -> dict[str, torch.Tensor]:
    """The output, and gradients of the tensors with these names."""
    tensors = {name: getattr(problem, name).detach().requires_grad_(name in needed) for name in NAMES}
    output = function(dataclasses.replace(problem, **tensors))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(problem.dtype)
    asked = [tensors[name] for name in needed]
    grads = torch.autograd.grad(output, asked, grad.to(output.dtype), materialize_grads=True)
    return {"output": output.detach(), **dict(zip(needed, grads, strict=True))}


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
class TestNumbers:
    @pytest.mark.parametrize(
        ("loads", "width", "inner"),
        [
            ([1], LEAST, LEAST),
            ([1, 0, 2, 3, 4, 5], 2 * LEAST, 3 * LEAST),
            ([15, 16, 17, 31, 32, 33, 0, 48], LEAST, 5 * LEAST),
            ([127, 128, 129, 260], 3 * LEAST, 2 * LEAST),
            ([70, 3], 100 * LEAST, 30 * LEAST),  # fewer panels fit at once than an expert's rows need
            ([1, 2, 5, 20, 40], LEAST + STEP, LEAST + 3 * STEP),  # no multiples of what is multiplied at once
            ([3, 4, 30, 17], 3 * LEAST - STEP, 7 * LEAST + 2 * STEP),
        ],
        ids=str,
    )
    def test_as_the_reference(self, loads, width, inner, dtype, calls):
        problem = example(loads, width, inner, dtype)
        output = cpu.inference(problem)
        assert output.dtype == dtype
        assert_near({"output": output}, {"output": reference(problem).detach()}, TOLERANCE[dtype] / 3)
        actual = gradients(problem, cpu.experts)
        assert torch.equal(actual["output"], output)
        assert all(actual[name].dtype == getattr(problem, name).dtype for name in NAMES)
        assert_near(actual, gradients(problem, reference), TOLERANCE[dtype] / 3)
        assert len(calls) == 3

    @pytest.mark.parametrize("needed", [("hidden_states",), ("first_proj",), ("down_proj", "top_k_weights")], ids=str)
    def test_some_gradients(self, needed, dtype, calls):
        problem = example([3, 0, 40, 7], LEAST, 2 * LEAST, dtype, top_k=2)
        assert_near(
            gradients(problem, cpu.experts, needed), gradients(problem, reference, needed), TOLERANCE[dtype] / 3
        )
        assert len(calls) == 2

    def test_no_second_derivatives(self, dtype, calls):
        problem = example([3, 20], LEAST, LEAST, dtype)
        problem.hidden_states.requires_grad_()
        (grad,) = torch.autograd.grad(cpu.experts(problem).sum(), problem.hidden_states, create_graph=True)
        with pytest.raises(RuntimeError, match="grouped_mm"):
            grad.sum().backward()

    def test_several_experts_of_a_token(self, dtype, calls):
        problem = example([20, 1, 7, 50, 0, 2], 2 * LEAST, LEAST, dtype, top_k=4)
        assert_near(gradients(problem, cpu.experts), gradients(problem, reference), TOLERANCE[dtype] / 3)
        assert calls

    def test_experts_of_other_processes_add_nothing(self, dtype, calls):
        problem = example([20, 1, 7], LEAST, 2 * LEAST, dtype, top_k=2, elsewhere=10)
        nowhere = (problem.top_k_index >= 3).all(dim=1)
        assert nowhere.any()
        output = cpu.inference(problem)
        assert_near({"output": output}, {"output": reference(problem)}, TOLERANCE[dtype] / 3)
        assert not output[nowhere].any()
        assert_near(gradients(problem, cpu.experts), gradients(problem, reference), TOLERANCE[dtype] / 3)
        assert calls

    def test_the_same_each_time(self, dtype, calls):
        """Whichever thread takes which expert."""
        problem = example([5, 60, 2, 130], 2 * LEAST, 4 * LEAST, dtype, top_k=1)
        first = gradients(problem, cpu.experts)
        for _ in range(5):
            again = gradients(problem, cpu.experts)
            assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
        assert len(calls) == 12

    def test_weights_that_are_views(self, dtype, calls):
        """Of every other expert, in rows that are longer, at places that no file aligns."""
        problem = example([3, 18, 40], LEAST, LEAST, dtype)
        expected = gradients(problem, cpu.experts)
        for name in ("first_proj", "down_proj"):
            weight = getattr(problem, name)
            experts, rows, columns = weight.shape
            wide = torch.zeros(1 + 2 * experts * rows * (columns + 3), dtype=dtype)[1:].view(
                2 * experts, rows, columns + 3
            )
            view = wide[::2, :, 1:-2]
            setattr(problem, name, view.copy_(weight))
        problem.hidden_states = problem.hidden_states.t().contiguous().t()
        problem.top_k_index = problem.top_k_index.int()
        actual = gradients(problem, cpu.experts)
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
        assert len(calls) == 4

    def test_with_another_default_device(self, dtype, calls):
        """Work space is where the tensors are."""
        problem = example([1, 3, 20], LEAST, LEAST, dtype)
        expected = gradients(problem, cpu.experts)
        torch.set_default_device("meta")
        try:
            output = cpu.experts(problem)
            tensors = [tensor.requires_grad_() for tensor in problem.differentiable]
            grads = torch.autograd.grad(cpu.experts(problem), tensors, torch.ones_like(output))
        finally:
            torch.set_default_device(None)
        assert torch.equal(output, expected["output"])
        assert all(grad.device.type == "cpu" for grad in grads)
        assert len(calls) == 5

    def test_under_autocast(self, dtype, calls):
        """Weights are float32 then, and so are their gradients."""
        problem = example([3, 20, 0, 1], LEAST + STEP, LEAST, torch.float32)
        problem.dtype = dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            actual = gradients(problem, cpu.experts)
        assert all(tensor.dtype == torch.float32 for tensor in actual.values())
        assert_near(actual, gradients(problem, reference), TOLERANCE[dtype] / 2)
        assert len(calls) == 2

    def test_compiled(self, dtype, calls, monkeypatch):
        """In a graph with gradients too; whatever was chosen for the output holds for the way back."""
        monkeypatch.setattr(compiled, "native_pays", lambda *_, **__: True)
        torch._dynamo.reset()  # whose graphs of other tests count towards a limit
        problem = example([3, 0, 40, 7], LEAST, 2 * LEAST, dtype, top_k=2)
        expected = gradients(problem, cpu.experts)
        del calls[:]
        function = torch.compile(compiled.experts, fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(native, "_run", forgetting(native._run, monkeypatch))
        actual = gradients(problem, function)
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
        assert len(calls) == 2

    def test_in_a_model(self, dtype, calls):
        """Its logits, of many tokens and of one, are those of eager experts."""
        sizes = {"hidden_size": 2 * LEAST, "num_heads": 2, "head_dim": None, "moe_intermediate_size": LEAST}
        model = tiny_model(**sizes, num_experts=4, num_experts_per_tok=2).to(dtype).eval()
        tokens = torch.arange(14).view(2, 7)
        logits = {}
        with torch.no_grad():
            for name in ("eager", "subtoken"):
                model.set_experts_implementation(name)
                logits[name] = torch.cat([model(tokens).logits, model(tokens[:, :1]).logits], dim=1)
        assert_near({"logits": logits["subtoken"]}, {"logits": logits["eager"].double()}, TOLERANCE[dtype])
        assert len(calls) == 2 * model.config.num_hidden_layers


def activations() -> list:
    """All that are known in C, without gates and as that of gates."""
    return [
        pytest.param(named(name, gated), id=f"{name} of gates" if gated else name)
        for name in FUNCTIONS
        for gated in (False, True)
    ]


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHER_NAMES])
def test_activations_of_transformers_are_known(name):
    rows = torch.linspace(-9, 9, 300, dtype=torch.float64)
    known = name_of(ACT2FN[name])
    torch.testing.assert_close(FUNCTIONS[known](rows), ACT2FN[name](rows), rtol=1e-12, atol=1e-12)
    assert name_of(torch.nn.GELU(approximate="tanh")) == "gelu_pytorch_tanh"
    assert name_of(torch.nn.Mish()) is None


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", activations())
class TestActivations:
    @pytest.mark.parametrize(
        ("loads", "width", "inner"),
        [
            ([1, 0, 2, 3, 4, 5], 2 * LEAST, 3 * LEAST),
            ([15, 33, 0, 48, 129], 3 * LEAST - STEP, 7 * LEAST + 2 * STEP),
            ([70, 3], 30 * LEAST, 20 * LEAST),
        ],
        ids=str,
    )
    def test_as_the_reference(self, activation, loads, width, inner, dtype, calls):
        problem = example(loads, width, inner, dtype, activation=activation)
        actual = gradients(problem, cpu.experts)
        assert_near(actual, gradients(problem, reference), TOLERANCE[dtype] / 3)
        assert torch.equal(cpu.inference(problem), actual["output"])
        assert len(calls) == 3

    def test_large_and_small_numbers(self, activation, dtype, calls):
        """Exponentials neither overflow nor lose what is left of them."""
        problem = example([1, 5, 40], LEAST, LEAST, dtype, activation=activation)
        for scale in (1e-3, 5.0, 30.0, 1e3):
            scaled = dataclasses.replace(problem, hidden_states=problem.hidden_states * scale)
            actual = gradients(scaled, cpu.experts)
            assert all(tensor.isfinite().all() for tensor in actual.values())
            assert_near(actual, gradients(scaled, reference), TOLERANCE[dtype] / 3)
        assert calls

    def test_nan_and_infinity_stay_in_their_rows(self, activation, dtype, calls):
        for loads in ([2, 3], [20, 30]):
            problem = example(loads, LEAST, LEAST, dtype, activation=activation)
            before = cpu.inference(problem)
            for value in (float("nan"), float("inf")):
                problem.hidden_states[1, 3] = value
                output = cpu.inference(problem)
                assert not output[1].isfinite().any()
                others = torch.arange(len(output)) != 1
                assert torch.equal(output[others], before[others])
        assert calls


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FUNCTIONS])
def test_every_number_of_an_activation(name, dtype, calls):
    """One by one, from where all are equal to zero to where all are equal to their gates: to float32's last bits."""
    numbers = torch.linspace(-14, 14, 7 * 1024).view(-1, LEAST, 1).to(dtype)
    eye = torch.eye(LEAST, dtype=dtype).expand(len(numbers), -1, -1)
    problem = Problem(
        hidden_states=torch.ones(len(numbers), LEAST, dtype=dtype) / LEAST,
        first_proj=numbers.expand(-1, -1, LEAST).contiguous(),
        down_proj=eye.contiguous(),
        top_k_weights=torch.ones(len(numbers), 1, dtype=dtype),
        top_k_index=torch.arange(len(numbers))[:, None],
        activation=named(name, gated=False),
        dtype=dtype,
    )
    expected = ACT2FN[name](numbers[..., 0].double())
    bound = 3e-7 if dtype == torch.float32 else 2**-8
    assert ((cpu.inference(problem) - expected).abs() <= bound * expected.abs().clamp(min=1)).all()
    assert calls


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_an_activation_are_called(hook, calls):
    sizes = {"hidden_size": LEAST, "num_attention_heads": 2, "head_dim": None, "moe_intermediate_size": LEAST}
    seen: list[torch.nn.Module] = []
    for gated in (False, True):
        model = tiny_model(**sizes, num_moe_heads=1, num_experts=4, num_experts_per_tok=2, gated_mlp=gated)
        function = model.model.layers[0].mlp.experts.act_fn
        getattr(function, hook)(lambda module, *_: seen.append(module))
        model.model.layers[0].mlp(torch.randn(1, 5, LEAST))
        assert seen[-1] is function
    assert not calls


@needs_compiler
class TestWhatIsLeftToOthers:
    @pytest.mark.parametrize("experts_class", [TwoMatrixExperts, TransposedExperts, InterleavedExperts])
    def test_other_layouts(self, experts_class, calls):
        with torch.no_grad():
            make(experts_class)(*inputs(90))
        assert not calls

    @pytest.mark.parametrize("sizes", [(LEAST + STEP // 2, LEAST), (LEAST, LEAST + STEP // 2), (LEAST - STEP, LEAST)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
    def test_other_sizes_and_dtypes(self, dtype, sizes, calls):
        problem = example([3, 20], *sizes, dtype)
        assert_near({"output": cpu.inference(problem)}, {"output": reference(problem)}, TOLERANCE[dtype])
        assert not calls

    def test_weights_in_less_than_the_products(self, calls):
        problem = example([3, 20], LEAST, LEAST, torch.bfloat16)
        problem.dtype = torch.float32
        assert_near({"output": cpu.inference(problem)}, {"output": reference(problem)}, TOLERANCE[torch.bfloat16])
        assert not calls

    @pytest.mark.parametrize("name", ["hidden_states", "down_proj", "top_k_index"])
    def test_subclasses_of_tensors(self, name, calls):
        problem = example([3, 20], LEAST, LEAST, torch.float32)
        expected = reference(problem)
        setattr(problem, name, getattr(problem, name).as_subclass(Subclass))
        with torch._C.DisableTorchFunctionSubclass():
            assert_near({"output": cpu.inference(problem)}, {"output": expected}, 1e-5)
        assert not calls

    def test_nothing_to_compute(self, calls):
        problem = example([0, 0], LEAST, LEAST, torch.float32)
        assert cpu.inference(problem).shape == (0, LEAST)
        assert not calls

    def test_what_counts_operators(self, calls):
        problem = example([3, 20], LEAST, LEAST, torch.float32)
        with FlopCounterMode(display=False) as counter:
            cpu.inference(problem)
        assert counter.get_total_flops() > 0
        assert not calls

    def test_variable(self, calls, monkeypatch):
        monkeypatch.setenv(native.VARIABLE, "0")
        problem = example([3, 20], LEAST, LEAST, torch.float32)
        assert_near({"output": cpu.inference(problem)}, {"output": reference(problem)}, 1e-5)
        assert not calls


@needs_compiler
def test_no_memory(calls, monkeypatch):
    """The library says so; nothing is returned that was not filled."""
    failing = type("Library", (), {"mhmoe_forward": staticmethod(lambda _: 1)})
    monkeypatch.setattr(native, "_library", lambda: failing)
    with pytest.raises(MemoryError, match="fewer tokens"):
        cpu.inference(example([3, 20], LEAST, LEAST, torch.float32))


class TestCompiling:
    @pytest.fixture(autouse=True)
    def anew(self, monkeypatch, tmp_path):
        """In a folder of its own, as if no process had done so."""
        monkeypatch.setattr(native, "cached_assets_path", lambda **_: tmp_path)
        monkeypatch.setattr(native, "_library", native._library.__wrapped__)
        monkeypatch.setattr(native, "_dtypes", native._dtypes.__wrapped__)

    @needs_compiler
    def test_is_done_once(self, tmp_path, monkeypatch):
        assert torch.float32 in native.dtypes()
        (file,) = tmp_path.iterdir()
        before = file.stat().st_mtime_ns
        monkeypatch.setattr(native.subprocess, "run", None)
        assert torch.float32 in native.dtypes()
        assert file.stat().st_mtime_ns == before

    @needs_compiler
    def test_of_two_at_once_each_has_a_whole_file(self, tmp_path):
        found = []
        threads = [threading.Thread(target=lambda: found.append(native.dtypes())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert all(torch.float32 in dtypes for dtypes in found)
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("compiler", ["there-is-none", "false"])
    def test_without_a_compiler(self, compiler, tmp_path, monkeypatch):
        monkeypatch.setenv("CC", compiler)
        assert native.dtypes() == frozenset()
        assert not list(tmp_path.iterdir())
        assert not native.can(example([3], LEAST, LEAST, torch.float32))

    def test_a_compiler_that_hangs(self, tmp_path, monkeypatch):
        script = tmp_path / "bin" / "cc"
        script.parent.mkdir()
        script.write_text("#!/bin/sh\nexec sleep 30\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(script))
        monkeypatch.setattr(native, "SECONDS", 0.1)
        assert native.dtypes() == frozenset()

    def test_a_damaged_file(self, tmp_path, monkeypatch):
        """Then nothing is loaded, and nothing fails."""
        monkeypatch.setattr(
            native.hashlib, "sha256", lambda _: type("Digest", (), {"hexdigest": lambda _: "0" * 16})()
        )
        (tmp_path / f"{'0' * 16}.so").write_bytes(b"no library")
        monkeypatch.setenv("CC", shutil.which("cc") or sys.executable)
        assert native.dtypes() == frozenset()

    @needs_compiler
    def test_where_nothing_can_be_kept(self, monkeypatch, tmp_path):
        """Then each process compiles for itself."""

        def fail(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(native, "cached_assets_path", fail)
        assert torch.float32 in native.dtypes()
        assert not list(tmp_path.iterdir())

    @needs_compiler
    @pytest.mark.parametrize("flags", [(), ("-mno-avx512f",), ("-mno-amx-tile",)], ids=str)
    def test_other_processors(self, flags, monkeypatch):
        """What is compiled without some instructions computes the same, with those that are left."""
        monkeypatch.setattr(native, "refused", lambda: flags)
        library = native._library()
        if library is None:
            pytest.skip("the compiler does not know this flag")
        monkeypatch.setattr(native, "_library", lambda: library)
        monkeypatch.setattr(cpu, "native_pays", lambda *_, **__: True)
        for dtype in native.dtypes():
            for sizes in ((2 * LEAST, 3 * LEAST), (LEAST + STEP, 2 * LEAST + 3 * STEP)):
                for name, gated in product(FUNCTIONS, (False, True)):
                    problem = example([1, 3, 20, 40], *sizes, dtype, activation=named(name, gated))
                    assert native.can(problem)
                    assert_near(gradients(problem, cpu.experts), gradients(problem, reference), TOLERANCE[dtype] / 3)

    @needs_compiler
    @pytest.mark.parametrize("processor", ["native", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids"])
    def test_without_warnings(self, processor, tmp_path):
        checked = ["-O1", "-Wall", "-Wextra", "-Wno-psabi", f"-march={processor}", "-c", "-o", tmp_path / "experts.o"]
        ran = subprocess.run(["cc", *checked, native.SOURCE], capture_output=True, text=True)
        if "-march" in ran.stderr:
            pytest.skip("the compiler does not know this processor")
        assert (ran.returncode, ran.stderr) == (0, "")

    @needs_compiler
    def test_reads_and_writes_nothing_else(self, tmp_path):
        """As the compiler's own checker of memory sees it."""
        source, program = Path(__file__).with_name("check_native.c"), tmp_path / "check"
        checked = ["-O1", "-g", "-march=native", "-fsanitize=address", "-static-libasan", "-Wno-psabi"]
        command = ["cc", *checked, f'-DNATIVE="{native.SOURCE}"', source, "-o", program, "-lm"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("the compiler has no checker")
        # what is left at exit is not looked for, which debuggers and some sandboxes do not allow
        ran = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
        if "Shadow memory" in ran.stderr:
            pytest.skip("the system leaves the checker no room")
        assert (ran.returncode, ran.stderr) == (0, "")
