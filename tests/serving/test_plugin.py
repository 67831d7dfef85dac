"""The plugin for vLLM where there is no vLLM; with it, see tests/vllm."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from commands import assert_one_line, run
from tiny import tiny_config, tiny_model, tiny_tokenizer

from mhmoe import MHMoEModel


def test_the_entry_point_waits_for_vllm():
    [plugin] = entry_points(group="vllm.general_plugins", name="mhmoe")
    assert plugin.value == "mhmoe.serving.plugin:register"
    program = "import sys, mhmoe.serving.plugin; print(*[name for name in ('torch', 'vllm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_that_would_give_an_expert_whole_tokens_are_refused(server):
    config = tiny_config()
    config._attn_implementation = server  # as their Transformers backends set it
    with pytest.raises(ValueError, match=f"^{server}'s own Transformers backend"):
        MHMoEModel(config)


def test_evaluation_with_vllm_needs_it(tmp_path, capsys, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    status, errors = run(capsys, monkeypatch, "eval", tmp_path, "--tasks", "mhmoe_smoke", "--backend", "vllm")
    assert_one_line(status, errors, "--backend vllm needs vllm; install vLLM, or leave --backend out")
