"""What other systems lack, stood in for: locks, renaming onto files, GCC's OpenMP, advice about memory."""

import ctypes
import errno
import gc
import importlib
import mmap
import os
import sys
from collections import defaultdict

import pytest
import torch
from tiny import save_dense

from mhmoe.backends.cpu import memory, workers
from mhmoe.conversion import convert, staging


SMALL = {"num_moe_heads": 4, "num_experts": 6, "moe_intermediate_size": 8}
SIZE = (memory.LARGE_BYTES // 1024 + 2, 256)  # of float32: a little more than LARGE_BYTES


def weights(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def windows_renames(monkeypatch):
    """Windows renames nothing onto what exists; there `os.replace` alone does, and to files alone."""
    rename, replace = os.rename, os.replace

    def refuse(target):
        raise FileExistsError(errno.EEXIST, "exists", str(target))

    monkeypatch.setattr(os, "rename", lambda a, b: refuse(b) if os.path.exists(b) else rename(a, b))
    monkeypatch.setattr(os, "replace", lambda a, b: refuse(b) if os.path.isdir(b) else replace(a, b))


class Interrupted(Exception):
    pass


def interrupt(descriptor: int):
    raise Interrupted


@pytest.mark.parametrize("cut_short", [False, True])
def test_conversion_where_renaming_onto_files_fails(tmp_path, monkeypatch, windows_renames, cut_short):
    source = save_dense(tmp_path / "dense")
    expected = weights(convert(source, tmp_path / "expected", seed=1, **SMALL))
    output = convert(source, tmp_path / "out", **SMALL)
    if cut_short:  # a journal is left, and takes the place of itself when the conversion goes on
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(Interrupted):
                convert(source, output, seed=1, overwrite=True, resume=True, **SMALL)
        assert (staging.stage_of(output) / staging.JOURNAL).exists()
    convert(source, output, seed=1, overwrite=True, resume=True, **SMALL)
    assert weights(output) == expected
    assert not staging.stage_of(output).exists()


def test_conversion_where_there_are_no_locks(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    expected = weights(convert(source, tmp_path / "expected", **SMALL))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("O_DIRECTORY", "O_NOFOLLOW"):
        monkeypatch.delattr(os, name)
    try:
        importlib.reload(staging)
        assert staging.fcntl is None
        with staging.staged_folder(tmp_path / "staged", False, source, {}, False) as folder:
            (folder / "file").write_text("text")
        assert (tmp_path / "staged" / "file").read_text() == "text"
        assert not staging.stage_of(tmp_path / "staged").exists()
    finally:
        monkeypatch.undo()
        importlib.reload(staging)
    monkeypatch.setattr(staging, "fcntl", None)
    assert weights(convert(source, tmp_path / "out", **SMALL)) == expected


@pytest.mark.skipif(staging.fcntl is None, reason="there are no locks")
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_conversion_where_the_file_system_has_no_locks(tmp_path, monkeypatch, error):
    def flock(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    assert convert(save_dense(tmp_path / "dense"), tmp_path / "out", **SMALL).is_dir()


class LibraryWithoutEntryPoints:
    def __init__(self, name: str):
        pass


def no_library(name: str):
    raise OSError("no such file")


@pytest.mark.parametrize("library", [no_library, LibraryWithoutEntryPoints])
def test_experts_where_there_is_no_openmp_of_gcc(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert workers._openmp() is None
    monkeypatch.setattr(workers, "OPENMP", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done = []
    workers.run(lambda: done.append, [workers.QUICK_MULTIPLY_ADDS + 1] * 5)
    assert done == list(range(5))


class RefusedAdvice(mmap.mmap):
    def madvise(self, *arguments):
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture
def blocks(monkeypatch):
    gc.collect()
    blocks = defaultdict(list)
    monkeypatch.setattr(memory, "_blocks", blocks)
    return blocks


@pytest.mark.skipif(not memory.LINUX, reason="elsewhere it is torch.empty")
class TestMemory:
    @pytest.mark.parametrize("warm", [memory.WARM_BYTES, 0])
    def test_where_the_system_takes_no_advice(self, monkeypatch, blocks, warm):
        unraisable = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        monkeypatch.setattr(memory.mmap, "mmap", RefusedAdvice)
        monkeypatch.setattr(memory, "WARM_BYTES", warm)
        tensor = memory.empty(SIZE, torch.float32).fill_(3)
        assert (tensor == 3).all()
        del tensor
        gc.collect()
        assert not unraisable
        assert sum(map(len, blocks.values())) == (1 if warm else 0)  # what could not be given back is not kept

    def test_where_no_more_can_be_mapped(self, monkeypatch, blocks):
        def refuse(*arguments, **options):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr(memory.mmap, "mmap", refuse)
        assert (memory.empty(SIZE, torch.float32).fill_(3) == 3).all()
