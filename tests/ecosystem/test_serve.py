"""`transformers serve` and `transformers chat` of a folder, over loopback."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from paths import SUPPORT
from servers import complete_chat, serving
from tiny import tiny_model, tiny_tokenizer


for tool in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(tool)

TRANSFORMERS = [sys.executable, str(Path(__file__).with_name("transformers_cli.py"))]
SERVERS = {  # of the folder's own code, where mhmoe is not installed, and of the package's
    "remote code": [*TRANSFORMERS, "serve", "--trust-remote-code"],
    "package": [sys.executable, "-m", "mhmoe", "serve"],
}
MESSAGES = [{"role": "user", "content": "a cat?"}]
TOKENS = 8


def environment(folder: Path) -> dict[str, str]:
    places = {
        "PYTHONPATH": str(SUPPORT),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_CACHE": str(folder / "hub"),
    }
    return {**os.environ, **places, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answer(folder) -> str:
    """What the model says to `MESSAGES`, greedily."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"user: {MESSAGES[0]['content']}", return_tensors="pt")["input_ids"]
    model = tiny_model(num_moe_heads=4, shared_expert_intermediate_size=16)
    generated = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)


@dataclass
class Server:
    url: str
    model: str

    def ask(self, **request):
        asked = {"model": self.model, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0, **request}
        return complete_chat(self.url, **asked)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, folder, tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    command = [*SERVERS[request.param], str(folder), "--device", "cpu"]
    with serving(command, root, environment(root), cwd=root) as url:
        yield Server(url, str(folder))


def test_an_answer(server, answer):
    reply = json.load(server.ask())
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": answer}
    assert reply["usage"]["completion_tokens"] == TOKENS


def test_a_streamed_answer(server, answer):
    events = [line.decode().removeprefix("data: ") for line in server.ask(stream=True) if line.strip()]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events if event.strip() != "[DONE]"]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer
    assert sum(bool(delta.get("content")) for delta in deltas) > 1


def test_the_model_is_listed(server):
    listed = json.load(urlopen(f"{server.url}/v1/models"))
    assert server.model in [model["id"].removesuffix("@main") for model in listed["data"]]


def test_chat(server, answer, tmp_path):
    """The client, which loads no model itself."""
    flags = [f"max_new_tokens={TOKENS}", "do_sample=False", "temperature=0.0"]
    chat = subprocess.run(
        [*TRANSFORMERS, "chat", server.model, f"{server.url}/v1", *flags],
        input=f"{MESSAGES[0]['content']}\n!exit\n",
        env={
            **environment(tmp_path),
            "HF_HUB_OFFLINE": "0",
        },  # with which its client would not ask even a local server
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chat.stdout)
    assert answer in plain, chat.stdout[-3000:] + chat.stderr[-3000:]


@pytest.mark.parametrize(
    "arguments", [["no/such/folder"], ["--no-such-flag"], ["model", "--dtype", "float3"]], ids=lambda given: given[-1]
)
def test_a_mistake_is_one_line(arguments, tmp_path):
    command = [*SERVERS["package"], *arguments]
    run = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert arguments[-1] in run.stderr
