"""Memory that is kept for the next step."""

import os
import subprocess
import sys

import pytest
from paths import ROOT


STEPS = """
import importlib.util, resource, sys

spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
if sys.argv[2] == "kept":
    memory.keep_memory()
for step in range(11):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept: str, **variables: str) -> int:
    """Of ten steps that take 64 MB each and give it back."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    command = [sys.executable, "-c", STEPS, str(ROOT / "training" / "memory.py"), kept]
    run = subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no mallopt")
def test_pages_are_mapped_once():
    assert page_faults("given back") > 10 * 1000
    assert page_faults("kept") < 1000
    assert page_faults("kept", MALLOC_MMAP_THRESHOLD_="4096") > 10 * 1000  # whoever runs it has chosen


def test_elsewhere_nothing_is_done(monkeypatch):
    from mhmoe.training import memory

    def library(_):
        raise AssertionError("there is no such library")

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    memory.keep_memory()
