"""`mhmoe convert --resume`: whenever a conversion is killed, the same command finishes it, to the byte."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import assert_one_line, run
from cut_short import SMALL, contents, convert_and_die_inside_tensor, die, in_child
from tiny import save_dense
from transformers import AutoModelForCausalLM

from mhmoe.conversion import checkpoint, convert, writer
from mhmoe.conversion.staging import stage_of
from mhmoe.errors import UserError


FLAGS = ("--num-moe-heads", 4, "--num-experts", 6, "--moe-intermediate-size", 8, "--max-shard-size", "80KB")
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def convert_and_die_at_event(number: int, dense: Path, output: Path, **options) -> None:
    """Convert; be killed at the `number`th time (from 1) that something beside the source is opened, renamed, ..."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(output)):
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(hook)
    convert(dense, output, **SMALL, **options)


def undisturbed(dense: Path, output: Path, **options) -> dict[str, bytes]:
    """What the conversion makes in peace at the same place, which the report names."""
    files = contents(convert(dense, output, **SMALL, **options))
    shutil.rmtree(output)
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    return files


def assert_no_model(folder: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_killed_at_any_file(tmp_path, dense):
    output = tmp_path / "new" / "out"
    expected = undisturbed(dense, output)
    killed = 0
    for number in range(1, 1000):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        if in_child(convert_and_die_at_event, number, dense, output) == 0:
            break
        killed += 1
        if not output.exists():
            assert_no_model(stage_of(output))
        convert(dense, output, resume=True, **SMALL)
        assert contents(output) == expected, f"killed at file event {number}"
        assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert killed > 30


@pytest.mark.parametrize("number", [1, 2, 7, 20])
def test_killed_inside_a_tensor(tmp_path, dense, number, monkeypatch):
    output = tmp_path / "out"
    expected = undisturbed(dense, output, dtype="bfloat16")
    assert in_child(convert_and_die_inside_tensor, number, dense, output, dtype="bfloat16") == -signal.SIGKILL
    assert_no_model(stage_of(output))
    assert_no_model(stage_of(output) / "new")
    loaded, load = [], checkpoint.DenseCheckpoint.load
    monkeypatch.setattr(checkpoint.DenseCheckpoint, "load", lambda self, name: loaded.append(name) or load(self, name))
    convert(dense, output, resume=True, dtype="bfloat16", **SMALL)
    assert contents(output) == expected
    assert ("model.embed_tokens.weight" in loaded) == (number == 1)  # what is there is not made again


def test_killed_twice_and_after_a_reboot(tmp_path, dense):
    output = tmp_path / "out"
    expected = undisturbed(dense, output)
    assert in_child(convert_and_die_inside_tensor, 5, dense, output) == -signal.SIGKILL
    journal = stage_of(output) / "journal.json"
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "boot": "another"}))
    for part in stage_of(output).rglob("*.part"):  # as a file system may leave it when the power goes
        part.write_bytes(part.read_bytes()[:3000] + bytes(part.stat().st_size - 3000))
    assert in_child(convert_and_die_inside_tensor, 9, dense, output, resume=True) == -signal.SIGKILL
    convert(dense, output, resume=True, **SMALL)
    assert contents(output) == expected


def test_killed_while_replacing(tmp_path, dense):
    output = tmp_path / "out"
    expected = undisturbed(dense, output, seed=2)
    first = contents(convert(dense, output, seed=1, **SMALL))
    stage = stage_of(output)

    def die_between_renames():
        rename = Path.rename
        # the first rename of `output` itself moves it out of the way
        Path.rename = lambda self, target: (rename(self, target), self == output and die())[0]
        convert(dense, output, seed=2, overwrite=True, **SMALL)

    assert in_child(die_between_renames) == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(UserError, match="exists already"):
        convert(dense, output, seed=2, **SMALL)  # and the old model is back
    assert contents(output) == first
    convert(dense, output, seed=2, overwrite=True, resume=True, **SMALL)
    assert contents(output) == expected
    assert not stage.exists()


def test_resume_of_what_is_complete(tmp_path, dense):
    output = convert(dense, tmp_path / "out", resume=True, **SMALL)
    inode = output.stat().st_ino
    convert(dense, output, resume=True, **SMALL)
    assert output.stat().st_ino == inode
    with pytest.raises(UserError, match="exists already"):
        convert(dense, output, resume=True, seed=1, **SMALL)
    report = json.loads((output / "conversion.json").read_text())
    for source in ({}, [], None):  # as no conversion leaves it
        (output / "conversion.json").write_text(json.dumps({**report, "source": source}))
        with pytest.raises(UserError, match="exists already"):
            convert(dense, output, resume=True, **SMALL)


def test_a_leftover_is_refused_without_resume(tmp_path, dense, capsys, monkeypatch):
    output = tmp_path / "out"
    expected = undisturbed(dense, output)
    assert in_child(convert_and_die_inside_tensor, 5, dense, output) == -signal.SIGKILL
    left = contents(stage_of(output))
    assert_one_line(*run(capsys, monkeypatch, "convert", dense, output, *FLAGS), "--resume")
    for changed in (("--seed", 1), ("--dtype", "float16"), ("--base-model", "someone/else")):
        status, errors = run(capsys, monkeypatch, "convert", dense, output, *FLAGS, "--resume", *changed)
        assert_one_line(status, errors, "another")
    assert contents(stage_of(output)) == left
    convert(dense, output, overwrite=True, **SMALL)  # starts afresh
    assert contents(output) == expected


def test_a_changed_source_is_refused(tmp_path, dense, capsys, monkeypatch):
    output = tmp_path / "out"
    assert in_child(convert_and_die_inside_tensor, 5, dense, output) == -signal.SIGKILL
    os.utime(dense / "model.safetensors", ns=(1, 1))
    status, errors = run(capsys, monkeypatch, "convert", dense, output, *FLAGS, "--resume")
    assert_one_line(status, errors, "source file model.safetensors")


def test_what_others_put_there_is_not_lost(tmp_path, dense):
    stage = tmp_path / "out.partial"
    stage.mkdir()
    (stage / "thesis.txt").write_text("precious")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"thesis\.txt"):
            convert(dense, tmp_path / "out", **SMALL, **options)
    assert contents(stage) == {"thesis.txt": b"precious"}


def test_two_conversions_into_one_folder(tmp_path, dense, monkeypatch):
    output, write, statuses = tmp_path / "out", writer._write_shard, []

    def refused(**options):
        with pytest.raises(UserError, match="another conversion"):
            convert(dense, output, **SMALL, **options)

    def write_while_others_try(*arguments):
        if not statuses:
            statuses.extend(in_child(refused, **{option: True}) for option in ("resume", "overwrite"))
            statuses.append(in_child(refused))
        return write(*arguments)

    expected = undisturbed(dense, output)
    monkeypatch.setattr(writer, "_write_shard", write_while_others_try)
    assert contents(convert(dense, output, **SMALL)) == expected
    assert statuses == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


@pytest.mark.parametrize("resume", [False, True])
def test_full_disk(tmp_path, dense, resume):
    output = tmp_path / "out"
    expected = undisturbed(dense, output)

    def convert_with_little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        with pytest.raises(UserError, match=r"cannot be written.*File too large"):
            convert(dense, output, resume=resume, **SMALL)

    assert in_child(convert_with_little_space) == 0
    assert stage_of(output).exists() == resume
    assert {path.name for path in tmp_path.iterdir()} <= {"dense", "out.partial"}
    assert contents(convert(dense, output, resume=resume, **SMALL)) == expected


@pytest.mark.parametrize("resume", [False, True])
def test_interrupted_by_the_user(tmp_path, dense, resume, monkeypatch):
    output = tmp_path / "out"
    expected = undisturbed(dense, output)
    write, written = writer._write_tensor, []

    def interrupted_write(*arguments):
        written.append(1)
        if len(written) == 9:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(writer, "_write_tensor", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, output, resume=resume, **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == ({"dense", "out.partial"} if resume else {"dense"})
    assert contents(convert(dense, output, resume=resume, **SMALL)) == expected


def test_another_version_is_refused(tmp_path, dense, monkeypatch):
    assert in_child(convert_and_die_inside_tensor, 5, dense, tmp_path / "out") == -signal.SIGKILL
    journal = stage_of(tmp_path / "out") / "journal.json"
    journal.write_text(journal.read_text().replace(version("torch"), "1.0"))
    with pytest.raises(UserError, match=r"another version of torch \(1\.0\)"):
        convert(dense, tmp_path / "out", resume=True, **SMALL)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": [], "boot": 1}', "[" * 3000, None], ids=repr)
def test_a_journal_that_is_none(tmp_path, dense, content):
    stage = stage_of(tmp_path / "out")
    stage.mkdir()
    if content is None:
        os.mkfifo(stage / "journal.json")
    else:
        (stage / "journal.json").write_text(content)
    with pytest.raises(UserError, match=f"journal.json: .*{stage.name}|journal.json: is a device"):
        convert(dense, tmp_path / "out", resume=True, **SMALL)


def test_source_that_shrinks_meanwhile(tmp_path, dense, monkeypatch):
    write = writer._write_shard

    def shrink_and_write(*arguments):
        os.truncate(dense / "model.safetensors", 40_000)
        return write(*arguments)

    monkeypatch.setattr(writer, "_write_shard", shrink_and_write)
    with pytest.raises(UserError, match=r"model\.safetensors: ends inside tensor"):
        convert(dense, tmp_path / "out", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_as_a_program(tmp_path, dense):
    output = tmp_path / "out"
    expected = undisturbed(dense, output)
    killing = (
        "import os, signal; from mhmoe.conversion import writer; from mhmoe.cli import main; tensors = []\n"
        "write = writer._write_tensor\n"
        "def write_eleven(*arguments):\n"
        "    tensors.append(1)\n"
        "    len(tensors) > 11 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*arguments)\n"
        "writer._write_tensor = write_eleven\n"
        "main()\n"
    )
    arguments = ["convert", str(dense), str(output), *map(str, FLAGS)]
    assert subprocess.run([sys.executable, "-c", killing, *arguments]).returncode == -signal.SIGKILL
    assert not output.exists()
    subprocess.run([sys.executable, "-m", "mhmoe", *arguments, "--resume"], check=True)
    assert contents(output) == expected
