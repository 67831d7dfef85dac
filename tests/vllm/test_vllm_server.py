"""`vllm serve FOLDER`, asked over loopback; and how it refuses."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest


pytest.importorskip("vllm.version")  # tests/vllm alone would pass for vllm

from paths import SUPPORT
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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*SERVE, smollm2, *OPTIONS, "--host", "localhost", "--port", str(port)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while True:
            try:
                urlopen(f"http://localhost:{port}/health", timeout=10)
                break
            except (URLError, OSError):
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_an_answer_over_loopback(url, smollm2):
    body = {"model": str(smollm2), "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    reply = json.load(urlopen(Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=120))

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
