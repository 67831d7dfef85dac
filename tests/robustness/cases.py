"""
Cases of bad input: what is done to which file of a model folder, and the command that then meets it.

A case is plain JSON, so that one that failed once can be kept under `tests/regressions` and run again. Values of JSON
fields are kept as JSON text, since some of them no program should parse.
"""

import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hypothesis import strategies as st


@dataclass
class Edit:
    """
    Attributes:
        file: in the folder.
        what: "set" or "drop" the JSON field at `path`; "text" replaces all of the file by `value`; "cut" keeps a share
            of its bytes, "flip" changes one; "become" makes it what `value` names (a FIFO, a folder, ...); "header"
            sets a field of a safetensors header.
        path: keys and indices from the top of the JSON.
        value: JSON text, text, or a name.
        share: 0 to 1, where in the file.
    """

    file: str
    what: str
    path: list[str | int] = field(default_factory=list)
    value: str = ""
    share: float = 0.5


@dataclass
class Case:
    """
    Attributes:
        base: name of the folder that is copied before the edits, see `bases`.
        command: words of the command line; {model} is the edited folder, {dense} the source of a converted one, {text}
            a text, {output} a folder that does not exist.
        edits: one after the other.
    """

    base: str
    command: list[str]
    edits: list[Edit]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Case":
        values = json.loads(text)
        return cls(values["base"], values["command"], [Edit(**edit) for edit in values["edits"]])


ODD_VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "1.5", "-0.0", "1e-300", "1e400", "NaN", "-Infinity"),
    *(str(2**31), str(2**40), str(2**62), str(2**64), str(10**25), "100000", "10000000", "9" * 6000),
    *('""', '"x"', '"1"', '"silu"', '"float32"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"a\\nb"'),
    *(json.dumps("x" * 5000), "[]", "[1]", "[null]", "[[]]", '["a", 1]', "{}", '{"a": {}}', '{"rope_type": "yarn"}'),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000),
]
ODD_TEXTS = [
    *("", " ", "null", "[]", "{}", "{", "1", '"x"', "\ufeff{}", "{'a': 1}", "[" * 100_000, '{"a": 1, "a": 2}'),
    *("\x00" * 100, "\x89PNG\r\n", "<html>not found</html>"),
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    # cards
    *("---\ntags:\n\t- a\n---\n", "---\nlicense: apache: 2\n---\n", "---\na: *b\n---\n"),
    *("---\nx: " + "[" * 2000 + "\n---\n", "---\nlicense: [mit]\nbase_model: {a: 1}\n---\n"),
    *("---\n- a\n---\n# Card\n", "---\nnever closed\n", "# no front matter\n"),
]
BECOMES = ["missing", "folder", "fifo", "endless", "outside", "dangling", "loop", "not utf-8"]
CARDS = ["README.md", "LICENSE"]


def apply(edit: Edit, folder: Path) -> None:
    """Make the edit; one that a former edit left nothing to do for does nothing."""
    file = folder / edit.file
    match edit.what:
        case "become":
            _become(file, edit.value)
        case "text":
            if file.parent.is_dir() and not file.is_dir():
                file.write_text(edit.value, encoding="utf-8", errors="surrogatepass")
        case "set" | "drop":
            if (values := _read_json(file)) is not None:
                file.write_text(_edited(values, edit), encoding="utf-8")
        case "header":
            data = file.read_bytes() if file.is_file() else b""
            length = int.from_bytes(data[:8], "little")
            with suppress(ValueError):  # a former edit may have left no header
                header = _edited(json.loads(data[8 : 8 + length]), edit).encode()
                file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        case "cut":
            if file.is_file():
                os.truncate(file, int(file.stat().st_size * edit.share))
        case "flip":
            if file.is_file() and file.stat().st_size:
                data = bytearray(file.read_bytes())
                data[min(int(len(data) * edit.share), len(data) - 1)] ^= 1 << int(edit.value)
                file.write_bytes(data)


def _read_json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None


def _edited(values: object, edit: Edit) -> str:
    """JSON text of `values` with the edit, whose own text is put in last."""
    mark = "a value that stands for another"
    if not edit.path:
        return edit.value if edit.what != "drop" else "{}"
    inner = values
    for key in edit.path[:-1]:
        if isinstance(inner, dict):
            inner = inner.setdefault(key, {})
        elif isinstance(inner, list) and isinstance(key, int) and key < len(inner):
            inner = inner[key]
        else:
            return json.dumps(values)
    key = edit.path[-1]
    if isinstance(inner, dict):
        inner.pop(key, None) if edit.what == "drop" else inner.update({key: mark})
    elif isinstance(inner, list) and isinstance(key, int) and key < len(inner):
        if edit.what == "drop":
            del inner[key]
        else:
            inner[key] = mark
    return json.dumps(values, indent=1).replace(json.dumps(mark), edit.value)


def _become(file: Path, what: str) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    if not file.parent.is_dir():
        return
    match what:
        case "folder":
            file.mkdir()
            (file / "inside").write_text("a file in a folder\n")
        case "fifo":
            os.mkfifo(file)
        case "endless":
            file.symlink_to("/dev/zero")
        case "outside":
            file.symlink_to("/etc/passwd")
        case "dangling":
            file.symlink_to("nowhere")
        case "loop":
            file.symlink_to(file.name)
        case "not utf-8":
            file.write_bytes(b"---\nlicense: mit\n---\n\xff\xfe caf\xe9\n")


def paths_of(values: object, prefix: tuple = ()) -> list[list[str | int]]:
    """Every field of a JSON value."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else []
    found = []
    for key, value in pairs:
        found.append([*prefix, key])
        found += paths_of(value, (*prefix, key))[:40]  # of a vocabulary not every word
    return found


# fields that a folder may have, beside those it has
KNOWN_FIELDS = {
    "config.json": (
        *("quantization_config", "auto_map", "rope_scaling", "rope_theta", "head_dim", "dtype", "torch_dtype"),
        *("sliding_window", "layer_types", "no_rope_layers", "pretraining_tp", "attention_bias", "mlp_bias"),
        *("attn_implementation", "_attn_implementation", "output_attentions", "is_decoder", "max_length"),
    ),
    "generation_config.json": ("temperature", "do_sample", "cache_implementation", "max_length"),
    "tokenizer_config.json": ("auto_map", "tokenizer_class", "chat_template", "model_max_length"),
}


@st.composite
def edits(draw, folder: Path) -> Edit:
    """An edit of a file that `folder` has, or might have."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if not file.endswith(".py")]
    file = draw(st.sampled_from([*files, "adapter_config.json", "LICENSES", "NOTICE"]))
    whats = ["become", "text", "cut", "flip"]
    if file.endswith(".json"):
        whats += ["set"] * 8 + ["drop"]
    if file.endswith(".safetensors"):
        whats += ["header"] * 6
    what = draw(st.sampled_from(whats))
    share = draw(st.floats(0, 1))
    if what in ("set", "drop"):
        known = [[name] for name in KNOWN_FIELDS.get(file, ())] + paths_of(_read_json(folder / file) or {})
        path = draw(st.sampled_from(known or [["x"]]))
        return Edit(file, what, path, draw(st.sampled_from(ODD_VALUES)) if what == "set" else "")
    if what == "header":
        data = (folder / file).read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        values = [*ODD_VALUES[:24], '"F32"', '"I64"', '"BF16"', '"F8_E4M3"', "[48]", "[48, 48]", "[0, 1]", "[-4, 8]"]
        return Edit(file, what, draw(st.sampled_from(paths_of(header))), draw(st.sampled_from(values)))
    values = {"become": BECOMES, "text": ODD_TEXTS, "flip": [str(bit) for bit in range(8)], "cut": [""]}[what]
    return Edit(file, what, [], draw(st.sampled_from(values)), share)


# words that a user may get wrong, each after a command that takes it
ODD_OPTIONS = {
    "convert": (
        *("--num-experts", "--num-moe-heads", "--num-experts-per-tok", "--moe-intermediate-size", "--seed"),
        *("--shared-expert-intermediate-size", "--max-shard-size", "--dtype", "--strategy", "--revision"),
        "--base-model",
    ),
    "plan": (
        *("--num-experts", "--num-moe-heads", "--moe-intermediate-size", "--match", "--reference-experts"),
        "--revision",
    ),
    "train": (
        *("--block_size", "--max_steps", "--learning_rate", "--dtype", "--attn_implementation"),
        "--resume_from_checkpoint",
    ),
}
ODD_WORDS = (
    *("0", "1", "-1", "3", "7", "1.5", "10" * 13, "x", "", "1e9", "nan", "None", "5GB", "-5GB", "main", "a\nb"),
    "float64",
)


@st.composite
def cases(draw, bases: dict[str, tuple[Path, list[list[str]]]]) -> Case:
    """One or two edits of a base, and one of the commands for it, with an odd option now and then."""
    base = draw(st.sampled_from(sorted(bases)))
    folder, commands = bases[base]
    command = list(draw(st.sampled_from(commands)))
    made = draw(st.lists(edits(folder), min_size=1, max_size=2))
    if (options := ODD_OPTIONS.get(command[0])) and draw(st.integers(0, 5)) == 0:
        command += [draw(st.sampled_from(options)), draw(st.sampled_from(ODD_WORDS))]
        made = made[:1] if draw(st.booleans()) else []
    return Case(base, command, made)
