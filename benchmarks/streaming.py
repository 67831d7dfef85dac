"""
Memory and disk that text takes until it is trained on, streamed and packed beforehand. Each case is a process that
goes once through all the rows of a file.

    python benchmarks/streaming.py TOKENIZER SMALL_FILE LARGE_FILE

Writes streaming.json: of each case the rows, the peak of resident memory over what the process had before it opened
the file, and the bytes left in the cache of `datasets`.
"""

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from datasets import disable_progress_bars

from mhmoe.files import write_json
from mhmoe.loading import load_tokenizer
from mhmoe.training import TextStream, load_file, pack
from mhmoe.training.data import stream_files


RESULTS = Path(__file__).parent / "results"
BLOCK_SIZE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("--workers", type=int, default=1, help="of --streaming: its dataloader_num_workers")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--one", choices=("streamed", "packed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tokenizer, options.large, options.workers)))
        return
    rows = []
    for file, way in itertools.product((options.small, options.large), ("streamed", "packed")):
        command = [sys.executable, __file__, options.tokenizer, file, file, "--one", way]
        output = subprocess.run([*command, "--workers", str(options.workers)], check=True, stdout=subprocess.PIPE)
        rows.append({"file": Path(file).name, "way": way, **json.loads(output.stdout.splitlines()[-1])})
        print(rows[-1])
    write_json(
        options.results / "streaming.json", {"processor": processor(), "workers": options.workers, "rows": rows}
    )


def measure(way: str, tokenizer_name: str, file: str, workers: int) -> dict:
    disable_progress_bars()
    tokenizer = load_tokenizer(tokenizer_name)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        before = peak()
        if way == "packed":
            rows = pack(load_file(file), tokenizer, BLOCK_SIZE)
            number = sum(1 for _ in rows)
        else:
            stream = TextStream([stream_files([file])], tokenizer, BLOCK_SIZE, workers=workers)
            (text,) = stream.texts
            number = sum(len(window) for _, window in text.windows(text.start, stream.buffer_size))
        on_disk = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return {
            "rows": number,
            "peak_mib": round((peak() - before) / 2**10),
            "disk_mib": round(on_disk / 2**20),
        }


def peak() -> int:
    """Resident memory in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return found[0] if found else platform.processor()


if __name__ == "__main__":
    main()
