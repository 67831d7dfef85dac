"""The writer: bytes that do not depend on what was there, and tensors that are made one by one."""

import pytest
import torch
from safetensors.torch import load_file

from mhmoe.conversion.writer import PlannedTensor, plan_shards, write_shards


SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 4, 3), "d": (1,), "e": (0,)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)


class Source:
    """Random tensors, with a note of which were made."""

    def __init__(self):
        self.made: list[str] = []

    def tensors(self) -> dict[str, PlannedTensor]:
        return {
            name: PlannedTensor(shape, dtype, lambda name=name: self.make(name))
            for (name, shape), dtype in zip(SHAPES.items(), DTYPES, strict=True)
        }

    def make(self, name: str) -> torch.Tensor:
        self.made.append(name)
        return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(ord(name)))


def write(folder, size="1GB") -> tuple[list[str], int]:
    """Names of the tensors that were made, and the bytes that were reported."""
    folder.mkdir(exist_ok=True)
    source, reported = Source(), []
    tensors = source.tensors()
    write_shards(folder, plan_shards(tensors, size), tensors, reported.append)
    assert sum(reported) == sum(tensor.nbytes for tensor in tensors.values())
    return source.made, len(reported)


def test_tensors_arrive_in_their_dtype(tmp_path):
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        dtype = Source().tensors()[name].dtype
        assert tensor.dtype == dtype
        assert torch.equal(tensor, Source().make(name).to(dtype))


def test_any_cut_is_continued(tmp_path):
    write(tmp_path / "whole")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    counts = set()
    for cut in range(0, len(whole) + 1):
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.part").write_bytes(whole[:cut])
        made, _ = write(folder)
        assert made == list(SHAPES)[len(SHAPES) - len(made) :]
        counts.add(len(made))
        assert (folder / "model.safetensors").read_bytes() == whole, cut
    assert counts == {0, 2, 3, 4, 5}  # the last tensor is empty, so none stops right before it


def test_another_plans_file_is_written_anew(tmp_path):
    write(tmp_path / "whole")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors.part").write_bytes(whole.replace(b"BF16", b"F016") + b"more")
    assert write(tmp_path)[0] == list(SHAPES)
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def test_finished_shards_are_kept(tmp_path):
    write(tmp_path / "a", size=64)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert len(files) > 3
    last = max(name for name in files if name.endswith(".safetensors"))
    (tmp_path / "a" / last).unlink()
    made, _ = write(tmp_path / "a", size=64)
    assert 0 < len(made) < len(SHAPES)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files


def test_a_cast_in_pieces_is_a_cast(tmp_path, monkeypatch):
    write(tmp_path / "whole")
    monkeypatch.setattr("mhmoe.conversion.writer.PIECE", 4)
    write(tmp_path / "pieces")
    names = ["whole", "pieces"]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.parametrize("size", [0, -1, "0", "lots"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError):  # noqa: PT011
        plan_shards(Source().tensors(), size)
