"""`vllm serve FOLDER`, asked over loopback; and how it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest


pytest.importorskip("vllm.version")  # tests/vllm alone would pass for vllm

from paths import SUPPORT
from servers import complete_chat, serving
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer


SERVE = [sys.executable, SUPPORT / "vllm_cli.py", "serve"]
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 16


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory) -> Iterator[str]:
    command = [*SERVE, smollm2, *OPTIONS, "--host", "localhost"]
    with serving(command, tmp_path_factory.mktemp("server"), environment()) as url:
        yield url


def test_an_answer_over_loopback(url, smollm2):
    body = {"model": str(smollm2), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    reply = json.load(complete_chat(url, **body))

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    generated = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    expected = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({"use_bitnet": True}, [], "use_bitnet=True"),
        ({}, ["--data-parallel-size", "2"], "--enable-expert-parallel and --data-parallel-size 2"),
    ],
)
def test_a_refusal_ends_in_its_line(tmp_path, fields, options, named):
    tiny_config(**fields, architectures=["MHMoEForCausalLM"]).save_pretrained(tmp_path)
    command = [*SERVE, tmp_path, "--skip-tokenizer-init", *options]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert f"{tmp_path} is not served: {named}" in last
