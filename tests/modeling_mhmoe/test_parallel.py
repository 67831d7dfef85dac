"""Tensor- and expert-parallel plans on two CPU processes: outputs, gradients and saved weights are those of one."""

import inspect
import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from mhmoe import MHMoEForCausalLM


pytestmark = pytest.mark.skipif(
    "ep_size" not in inspect.signature(DistributedConfig).parameters, reason="transformers before 5.19 has no layouts"
)
LAYOUTS = {
    "tensor": {"tp_size": 2},
    "tensor and expert": {"tp_size": 2, "ep_size": 2},
    "data and expert": {"fsdp_size": 2, "ep_size": 2},
}
EXPERTS_IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "subtoken"]
# their experts' first matrices, and what of them a process of a tensor- or expert-parallel layout holds
MODELS = {
    "plain": {"num_moe_heads": 2, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "P1": {
        "num_moe_heads": 2,
        "gated_mlp": False,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
        "router_type": "xmoe",
        "router_bias_update_rate": 0.01,
        "head_layer_depth": 2,
        "head_merge_bias": True,
        "sub_token_residual": True,
    },
    "family": {
        "num_moe_heads": 2,
        "private_experts": True,
        "router_input": "token",
        "moe_latent_size": 32,
        "router_bias_update_rate": 0.01,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "bitnet": {"use_bitnet": True, "head_merge_bias": True, "mlp_only_layers": [0]},
}
EXPERT_WEIGHTS = {
    "plain": ("model.layers.1.mlp.experts.gate_up_proj", (6, 16, 24), (3, 32, 24)),
    "P1": ("model.layers.1.mlp.experts.up_proj", (6, 8, 24), (3, 16, 24)),
    "family": ("model.layers.1.mlp.experts.gate_up_proj", (12, 16, 16), (6, 32, 16)),
    "bitnet": ("model.layers.1.mlp.experts.gate_up_proj", (6, 32, 24), (3, 32, 24)),  # not split by inner size
}


def measure(model: MHMoEForCausalLM) -> dict[str, torch.Tensor]:
    """Logits, losses and all gradients for two rows of tokens, the same on every process; whole tensors."""
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        results = {"logits": model.eval()(ids).logits}
    outputs = model.train()(ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    results |= {"loss": outputs.loss.detach(), "aux_loss": outputs.aux_loss.detach()}
    results |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in results.items()}


def run(rank: int, folder: Path) -> None:
    """One of the two processes; the first writes what came out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for name, layout in itertools.product(MODELS, LAYOUTS):
        for implementation in EXPERTS_IMPLEMENTATIONS if name == "plain" else ["batched_mm"]:
            model = MHMoEForCausalLM.from_pretrained(
                folder / name / "model",
                distributed_config=DistributedConfig(**LAYOUTS[layout]),
                experts_implementation=implementation,
            )
            expert_weight = dict(model.named_parameters())[EXPERT_WEIGHTS[name][0]]
            local = expert_weight.to_local() if isinstance(expert_weight, DTensor) else expert_weight
            results = {"measured": measure(model), "expert_shape": tuple(local.shape)}
            if rank == 0:
                torch.save(results, folder / name / f"{layout} {implementation}.pt")
        model.save_pretrained(folder / name / layout)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    for name, fields in MODELS.items():
        tiny_model(**fields).save_pretrained(folder / name / "model")
    multiprocessing.spawn(run, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(("plain", implementation) for implementation in EXPERTS_IMPLEMENTATIONS),
        ("P1", "batched_mm"),
        ("bitnet", "batched_mm"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_compute_what_one_does(parallel, layout, name, implementation):
    folder = parallel / name
    expected = measure(MHMoEForCausalLM.from_pretrained(folder / "model", experts_implementation=implementation))
    results = torch.load(folder / f"{layout} {implementation}.pt")
    # 6 experts of inner size 16: split by inner size, or three experts to a process
    _, of_tensor, of_experts = EXPERT_WEIGHTS[name]
    assert results["expert_shape"] == (of_tensor if layout == "tensor" else of_experts)
    assert results["measured"].keys() == expected.keys()
    for name, value in expected.items():
        difference = (results["measured"][name] - value).abs().max() / value.abs().max()
        assert difference <= 1e-4, f"{name}: {difference:.1e} relative"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_gathers_the_weights_and_the_code(parallel, layout, name):
    original, saved = parallel / name / "model", parallel / name / layout
    assert {path.name for path in saved.iterdir()} == {path.name for path in original.iterdir()}
    weights, expected = load_file(saved / "model.safetensors"), load_file(original / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
