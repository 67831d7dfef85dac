"""
Time and memory of `mhmoe convert` (strategy exact) on a synthetic Llama checkpoint, against `cp -r` of the same bytes.

    python benchmarks/conversion_speed.py --folder /big/disk/tmp --gigabytes 4 --repeats 2

The checkpoint is made on the spot and deleted at the end. Every run starts with the files it reads dropped from the
page cache and ends with its own on the disk (fsync). `cp -r` copies the source and what the conversion wrote; a second
`cp -r` of the latter alone writes no more than the conversion does. They alternate, and the medians are compared. The
limit is a ratio of 2.5 to the former, and a peak of 1.5 GB plus three decoder layers.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlamaConfig


# a Llama of 1B's shape, and as many layers as the size asks for
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work: a disk with room for five times the size")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the source")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options.gigabytes, options.repeats)


def run(folder: Path, gigabytes: float, repeats: int) -> None:
    source, output, copy = folder / "source", folder / "output", folder / "copy"
    # in a process of its own: a child's peak, as the kernel counts it, starts at what its parent holds
    maker = multiprocessing.get_context("spawn").Process(target=make_source, args=(source, gigabytes))
    maker.start()
    maker.join()
    convert_times, copy_times, output_times, peaks = [], [], [], []
    for _ in range(repeats):
        drop_from_cache(source)
        start = time.perf_counter()
        peaks.append(convert(source, output))
        put_on_disk(output)
        convert_times.append(time.perf_counter() - start)

        for times, folders in ((copy_times, (source, output)), (output_times, (output,))):
            drop_from_cache(*folders)
            copy.mkdir()
            start = time.perf_counter()
            subprocess.run(["cp", "-r", *folders, copy], check=True)
            put_on_disk(copy)
            times.append(time.perf_counter() - start)
            shutil.rmtree(copy)

        written = size(output)
        layer = largest_layer(output)
        shutil.rmtree(output)
        print(f"convert {convert_times[-1]:.1f} s, peak {peaks[-1]:.2f} GB; ", end="")
        print(f"cp -r of both {copy_times[-1]:.1f} s, of what is written {output_times[-1]:.1f} s", flush=True)
    converting, copying, copying_output = map(statistics.median, (convert_times, copy_times, output_times))
    print(f"source {size(source) / 1e9:.2f} GB, written {written / 1e9:.2f} GB, largest decoder layer {layer:.3f} GB")
    print(f"convert / cp -r of both (medians of {repeats}): {converting / copying:.2f}, the limit is 2.5")
    print(f"convert / cp -r of what is written: {converting / copying_output:.2f}")
    print(f"peak memory: {max(peaks):.2f} GB, the limit is {1.5 + 3 * layer:.2f} GB")


def make_source(folder: Path, gigabytes: float) -> None:
    """A checkpoint in shards of at most some 5 GB, names sorted inside each as the Hub's libraries do."""
    folder.mkdir()
    embeddings = {"model.embed_tokens.weight": (SHAPE["vocab_size"], SHAPE["hidden_size"])}
    d, inner, keys = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["hidden_size"] // 4
    layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    layer |= {f"self_attn.{name}_proj": (keys if name in "kv" else d, d) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
    layer_bytes = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    layers = round((gigabytes * 1e9 - 2 * SHAPE["vocab_size"] * d) / layer_bytes)
    LlamaConfig(**SHAPE, num_hidden_layers=layers).save_pretrained(folder)

    per_shard = max(1, int(4.5e9 // layer_bytes))
    groups = [range(first, min(first + per_shard, layers)) for first in range(0, layers, per_shard)]
    weight_map = {}
    for number, group in enumerate(tqdm(groups, desc="Making the source", unit="shard")):
        shapes = {f"model.layers.{n}.{name}.weight": shape for n in group for name, shape in layer.items()}
        if number == 0:
            shapes |= embeddings | {"model.norm.weight": (d,)}
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1) for name, shape in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    put_on_disk(folder)


def convert(source: Path, output: Path) -> float:
    """Convert in a process of its own; its peak resident memory in GB, pages of mapped files included."""
    command = [sys.executable, "-m", "mhmoe", "convert", str(source), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: exit status {status}")
    return usage.ru_maxrss * 1024 / 1e9


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


def put_on_disk(folder: Path) -> None:
    for file in files(folder):
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())


def drop_from_cache(*folders: Path) -> None:
    for folder in folders:
        put_on_disk(folder)  # what is not yet on the disk is not dropped
        for file in files(folder):
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def largest_layer(folder: Path) -> float:
    """Bytes of the largest decoder layer of a converted checkpoint, in GB."""
    layers = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.startswith("model.layers."):
                    layers[name.split(".")[2]] += 2 * math.prod(opened.get_slice(name).get_shape())  # in bfloat16
    return max(layers.values()) / 1e9


if __name__ == "__main__":
    main()
