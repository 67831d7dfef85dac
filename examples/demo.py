"""
`make demo`: SmolLM2-135M, a real dense model, becomes an MH-MoE model: verified, run, evaluated, ready to upload.

All that it makes goes to outputs/demo, and each step shows the command that does the same.
"""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from fetch_smollm2 import HUB_ID, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhmoe import cli
from mhmoe.conversion import Verification, verify


FOLDER = Path("outputs/demo")
DENSE, CONVERTED, RESULTS = FOLDER / "smollm2", FOLDER / "smollm2-mhmoe", FOLDER / "results"
TASK = "mhmoe_smoke"
PROMPT = "Name three things to check before a long journey by bicycle."


def show(*words: str | Path) -> list[str]:
    command = ["mhmoe", *map(str, words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    return command


def run(*words: str | Path) -> None:
    sys.argv = show(*words)
    cli.main()


def generate(folder: Path) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def evaluate(folder: Path, results: Path) -> dict:
    run("eval", folder, "--tasks", TASK, "--batch_size", 8, "--device", "cpu", "--output_path", results)
    return json.loads(max(results.rglob("results_*.json")).read_text())


def table(verification: Verification, dense: dict, mhmoe: dict) -> str:
    costs = json.loads((CONVERTED / "conversion.json").read_text())["costs"]
    labels = {
        "parameters": "parameters",
        "active_parameters": "parameters active per token, at most",
        "ffn_multiply_adds": "FFN multiply-adds per token",
    }
    rows = [(label, f"{costs['dense'][name]:,}", f"{costs['mhmoe'][name]:,}") for name, label in labels.items()]
    rows += [
        ("max |logit difference|", "", f"{verification.max_logit_difference:g}"),
        (f"accuracy on {TASK}", *(f"{result['results'][TASK]['acc,none']:.3f}" for result in (dense, mhmoe))),
        ("experts activated", "", f"{mhmoe['routing'][TASK]['share_activated']:.1%}"),
    ]
    lines = [f"\n{'':<40}{'dense':>15}{'MH-MoE':>15}"]
    return "\n".join(lines + [f"{label:<40}{a:>15}{b:>15}" for label, a, b in rows])


def main() -> None:
    begin = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"Unpacking {HUB_ID} into {DENSE}", flush=True)
    fetch(DENSE)
    run("convert", DENSE, CONVERTED, "--base-model", HUB_ID)
    show("verify", DENSE, CONVERTED)
    verification = verify(DENSE, CONVERTED)
    print(verification.table())

    print(f"\n{PROMPT}")
    for name, folder in (("dense", DENSE), ("MH-MoE", CONVERTED)):
        print(f"\n[{name}] {generate(folder)}", flush=True)

    dense, mhmoe = (evaluate(folder, RESULTS / folder.name) for folder in (DENSE, CONVERTED))
    print(table(verification, dense, mhmoe))
    print(f"\nWhich experts the questions reached: {max(RESULTS.rglob('routing_*.png'))}")
    print(f"Ready to upload: {CONVERTED}, for instance with hf upload YOUR_NAME/smollm2-mhmoe {CONVERTED}")
    print(f"The demo took {time.monotonic() - begin:.0f} s.")


if __name__ == "__main__":
    main()
