"""A server in a process of its own, and what is asked of it over loopback."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen


@contextmanager
def serving(
    command: Sequence[str | Path], folder: Path, env: dict[str, str], cwd: Path | None = None
) -> Iterator[str]:
    """
    The address of a server that answers, for as long as the block lasts.

    Args:
        command: that starts it; its port is put at the end.
        folder: for its log, whose end is shown where it does not start.
        env: its environment.
        cwd: where it runs.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    url = f"http://localhost:{port}"
    try:
        while True:
            try:
                urlopen(f"{url}/health", timeout=10)
                break
            except (URLError, OSError):
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def complete_chat(url: str, **body) -> HTTPResponse:
    """The reply to a request of OpenAI's API, which is not read yet."""
    headers = {"Content-Type": "application/json"}
    return urlopen(Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers), timeout=120)
