"""Jobs for vLLM, and what transformers answers to the same prompts."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from paths import SUPPORT
from transformers import AutoModelForCausalLM


LOGPROB_TOLERANCE = 1e-3


@dataclass
class Job:
    """
    Attributes:
        together: all prompts at once, or one after the other.
        engine: arguments of vLLM's `LLM`.
        pooling_task: what is asked in place of a text to follow the prompts.
    """

    folder: str
    prompts: list[list[int]]
    tokens: int = 64
    together: bool = True
    engine: dict = field(default_factory=dict)
    pooling_task: str | None = None


def some_prompts(count: int = 4, seed: int = 0) -> list[list[int]]:
    """Of tiny models, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (5 + 7 * row,), generator=generator).tolist() for row in range(count)]


def run_jobs(jobs: list[Job], timeout: float = 1200) -> list[dict]:
    """For each job its `answers`, or the `error` that it ended in."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "jobs.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps([asdict(job) for job in jobs]))
        run = subprocess.run(
            [sys.executable, SUPPORT / "vllm_engine.py", asked, answered],
            env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        return json.loads(answered.read_text())


@torch.no_grad()
def transformers_answers(folder: str | Path, prompts: list[list[int]], tokens: int = 64) -> list[dict]:
    """The greedy tokens and their log-probabilities, prompt by prompt, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        generated = output.sequences[0, len(prompt) :]
        logprobs = torch.cat(output.logits).float().log_softmax(-1).gather(-1, generated[:, None])
        found.append({"tokens": generated.tolist(), "logprobs": logprobs.flatten().tolist()})
    return found


def assert_same(result: dict, expected: list[dict]) -> None:
    assert "error" not in result, result["error"]
    for answer, wanted in zip(result["answers"], expected, strict=True):
        assert answer["tokens"] == wanted["tokens"]
        differences = [abs(a - b) for a, b in zip(answer["logprobs"], wanted["logprobs"], strict=True)]
        assert max(differences) < LOGPROB_TOLERANCE
