"""
Cases of bad input: what is done to which file of a model folder, and the command that then meets it.

A case is plain JSON, so that one that failed once can be kept under `tests/regressions` and run again. Values of JSON
fields are kept as JSON text, since some of them no program should parse.
"""

import json
import os
import re
import shlex
import shutil
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from hypothesis import strategies as st


RAN = "ran"  # the folder that foreign code makes where it is run
SECRET = "what lies outside the model's folder"
TEXT = "../text.jsonl"  # beside the model


@dataclass
class Edit:
    """
    Attributes:
        file: in the folder, or the text beside it.
        what: "set" or "drop" the JSON field at `path`; "text" replaces all of the file by `value`; "cut" keeps a share
            of its bytes, "flip" changes one bit, "bytes" writes the bytes `value` (in hexadecimal) over others;
            "become" makes it what `value` names (a FIFO, a folder, ...); "header" sets a field of a safetensors
            header.
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
        base: name of the folder that is copied before the edits, see `bases`; or a dense family.
        command: words of the command line; {model} is the edited folder, {dense} the source of the converted one,
            {text} a text, {output} a folder that does not exist, {case} the one that all of them are in.
        edits: one after the other.
        fields: of the config; with any, a dense model of the family `base` is made with them.
        why: for people: what the case once did.
    """

    base: str
    command: list[str]
    edits: list[Edit] = field(default_factory=list)
    fields: dict = field(default_factory=dict)
    why: str = ""

    def to_json(self) -> str:
        """With the command as a shell would read it, and without what is as usual."""
        usual = asdict(Edit("", ""))
        values = {"why": self.why, **{name: value for name, value in asdict(self).items() if value}}
        values["command"] = " ".join(map(_quoted, self.command))
        values["edits"] = [
            {name: value for name, value in asdict(edit).items() if value != usual[name]} for edit in self.edits
        ]
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Case":
        values = json.loads(text)
        command, edits = shlex.split(values["command"]), [Edit(**edit) for edit in values.get("edits", [])]
        return cls(**{**values, "command": command, "edits": edits})


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w{}./,=-]+", word) else shlex.quote(word)


ODD_VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "1.5", "-0.0", "1e-300", "1e400", "NaN", "-Infinity"),
    *(str(2**31), str(2**40), str(2**62), str(2**64), str(10**25), "100000", "10000000", "9" * 6000),
    *("1024", "65536", str(2**20), str(2**23), str(2**24)),  # the most that sizes may be
    *('""', '"x"', '"1"', '"10000"', '"silu"', '"float32"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"'),
    *('"a\\nb"', '"\\u001b[31m"', '"../outside/model.safetensors"', '"/dev/zero"'),
    *(json.dumps("x" * 5000), "[]", "[1]", "[null]", "[[]]", '["a", 1]', "{}", '{"a": {}}', '{"rope_type": "yarn"}'),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '{"": "float32"}', '{"rope_theta": "10000"}'),
]
# the code that they name lies in the folder
AUTO_MAPS = [
    '{"AutoTokenizer": [null, "evil.Evil"]}',
    '{"AutoTokenizer": ["evil.Evil", null]}',
    '{"AutoTokenizer": [null, "repo--evil.Evil"]}',
    '{"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}',
]
TEMPLATES = [
    *('"{{ 1 / 0 }}"', '"{% for %}"', "\"{{ raise_exception('no') }}\"", '"{{ messages.x.y.z }}"'),
    *("\"{{ cycler.__init__.__globals__.os.mkdir('ran') }}\"", '[{"name": "default", "template": "x"}]', '{"a": "b"}'),
]
ODD_TEXTS = [
    *("", " ", "null", "[]", "{}", "{", "1", '"x"', "\ufeff{}", "{'a': 1}", "[" * 100_000, '{"a": 1, "a": 2}'),
    *("\x00" * 100, "\x89PNG\r\n", "<html>not found</html>", "{{ 1 / 0 }}", "{% for %}"),
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    # cards
    *("---\ntags:\n\t- a\n---\n", "---\nlicense: apache: 2\n---\n", "---\na: *b\n---\n"),
    *("---\nx: " + "[" * 2000 + "\n---\n", "---\nlicense: [mit]\nbase_model: {a: 1}\n---\n"),
    *("---\n- a\n---\n# Card\n", "---\nnever closed\n", "# no front matter\n", "---\n---\n", "---\na: &a [*a]\n---\n"),
    "---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n---\n",
    "---\nx: !!python/object/apply:os.mkdir [ran]\n---\n",
    # texts to learn from
    *('{"text": 1}\n', '{"text": null}\n', '{"other": "x"}\n', '{"text": "\\ud800"}\n', '["a", "b"]\n'),
    '{"text": "' + "a" * 100_000 + '"}\n',
]
BECOMES = [
    *("missing", "folder", "fifo", "socket", "endless", "outside", "other model's", "dangling", "loop", "not utf-8"),
    *("huge", "pickle"),
]
CARD_FIELDS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "base_model",
    "model_name",
    "model-index",
    "tags",
)
CARD_VALUES = (
    "1",
    "no",
    "[en, no]",
    "[1, {a: b}]",
    "{a: b}",
    "",
    "2024-01-01",
    "'a\n  b'",
    "org/name",
    "../x",
    "x: y",
)


def apply(edit: Edit, folder: Path) -> None:
    """Make the edit; one that a former edit left nothing to do for does nothing."""
    file = folder / edit.file
    match edit.what:
        case "become":
            _become(file, edit.value, folder)
        case "text":
            # not to a pipe, or to a link that leads in a circle, which a former edit may have made
            if file.parent.is_dir() and (file.is_file() or not os.path.lexists(file)):
                file.write_text(edit.value, encoding="utf-8", errors="surrogatepass")
        case "set" | "drop":
            if (values := _read_json(file)) is not None:
                file.write_text(_edited(values, edit), encoding="utf-8")
        case "header":
            data = file.read_bytes() if file.is_file() and file.stat().st_size < 2**30 else b""
            length = int.from_bytes(data[:8], "little")
            with suppress(ValueError):  # a former edit may have left no header
                header = _edited(json.loads(data[8 : 8 + length]), edit).encode()
                file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        case "cut":
            if file.is_file():
                os.truncate(file, int(file.stat().st_size * edit.share))
        case "flip" | "bytes":
            if file.is_file() and 0 < file.stat().st_size < 2**30:
                data = bytearray(file.read_bytes())
                place = min(int(len(data) * edit.share), len(data) - 1)
                if edit.what == "flip":
                    data[place] ^= 1 << int(edit.value)
                else:
                    new = bytes.fromhex(edit.value)
                    data[place : place + len(new)] = new
                file.write_bytes(data)


def _read_json(file: Path) -> object:
    try:
        whole = file.is_file() and file.stat().st_size < 2**30  # not what a former edit made huge
        return json.loads(file.read_text(encoding="utf-8")) if whole else None
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


class _Evil:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (RAN,)


def _become(file: Path, what: str, folder: Path) -> None:
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
        case "socket":
            os.mknod(file, 0o140600)
        case "endless":
            file.symlink_to("/dev/zero")
        case "outside":
            file.symlink_to(folder.parent / "secret.txt")
        case "other model's":  # which would do
            file.symlink_to(folder.parent / "outside" / file.name)
        case "dangling":
            file.symlink_to("nowhere")
        case "loop":
            file.symlink_to(file.name)
        case "not utf-8":
            file.write_bytes(b"---\nlicense: mit\n---\n\xff\xfe caf\xe9\n")
        case "huge":  # and takes no room
            file.touch()
            os.truncate(file, 2**36)
        case "pickle":
            torch.save(_Evil(), file)


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
        *("use_cache", "problem_type", "id2label", "num_labels", "base_model_tp_plan", "pad_token_id", "chunk_size"),
        *("experts_implementation", "_experts_implementation", "per_layer_config", "sub_configs", "return_dict"),
    ),
    "generation_config.json": ("temperature", "do_sample", "cache_implementation", "max_length", "stop_strings"),
    "tokenizer_config.json": (
        "auto_map",
        "tokenizer_class",
        "chat_template",
        "model_max_length",
        "extra_special_tokens",
    ),
    "conversion.json": ("verification", "figures", "calibration"),
}
NEW_FILES = (
    *("adapter_config.json", "LICENSES", "NOTICE", "LICENSE.env", "chat_template.json", "chat_template.jinja"),
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "merges.txt"),
    *("vocab.json", "pytorch_model.bin", "model.safetensors.index.json", "processor_config.json", "README.md"),
)
json_values = st.one_of(
    *[st.sampled_from(ODD_VALUES)] * 4,
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(json.dumps),
    st.text(max_size=12).map(json.dumps),
)


@st.composite
def edits(draw, folder: Path) -> Edit:
    """An edit of a file that `folder` has, or might have."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if not file.endswith(".py")]
    file = draw(st.sampled_from([*files, TEXT, draw(st.sampled_from(NEW_FILES))]))
    whats = ["become", "text", "cut", "flip", "bytes"]
    if file.endswith(".json") and file in files:
        whats += ["set"] * 10 + ["drop"] * 2
    if file.endswith(".safetensors"):
        whats += ["header"] * 6
    what = draw(st.sampled_from(whats))
    share = draw(st.one_of(st.just(0.0), st.floats(0, 1)))
    name = Path(file).name
    if what in ("set", "drop"):
        known = [[field] for field in KNOWN_FIELDS.get(name, ())] + paths_of(_read_json(folder / file) or {})
        path = draw(st.sampled_from(known or [["x"]]))
        special = {"auto_map": AUTO_MAPS, "chat_template": TEMPLATES}.get(str(path[-1]))
        values = json_values if special is None else st.sampled_from(special)
        return Edit(file, what, path, draw(values) if what == "set" else "")
    if what == "header":
        data = (folder / file).read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        values = [*ODD_VALUES[:24], '"F32"', '"I64"', '"BF16"', '"F8_E4M3"', "[48]", "[48, 48]", "[0, 1]", "[-4, 8]"]
        return Edit(file, what, draw(st.sampled_from(paths_of(header))), draw(st.sampled_from(values)))
    if what == "text" and name == "README.md" and draw(st.booleans()):
        key, value = draw(st.sampled_from(CARD_FIELDS)), draw(st.sampled_from(CARD_VALUES))
        return Edit(file, what, [], f"---\n{key}: {value}\n---\n# Card\n")
    values = {
        "become": st.sampled_from(BECOMES),
        "text": st.sampled_from(ODD_TEXTS),
        "flip": st.integers(0, 7).map(str),
        "bytes": st.binary(min_size=1, max_size=16).map(bytes.hex),
        "cut": st.just(""),
    }[what]
    return Edit(file, what, [], draw(values), share)


# words that a user may get wrong, each after a command that takes it
RUN_OPTIONS = (
    *("--block_size", "--max_steps", "--learning_rate", "--dtype", "--attn_implementation", "--text_column"),
    *("--resume_from_checkpoint", "--experts_implementation", "--seed", "--per_device_train_batch_size"),
)
NEW_MODEL_OPTIONS = (*RUN_OPTIONS, "--config_overrides", "--max_eval_samples", "--tokenizer_name", "--vocab_size")
ODD_OPTIONS = {
    "convert": (
        *("--num-experts", "--num-moe-heads", "--num-experts-per-tok", "--moe-intermediate-size", "--seed"),
        *("--shared-expert-intermediate-size", "--max-shard-size", "--dtype", "--strategy", "--revision"),
        *("--base-model", "--calibration", "--calibration-tokens", "--router-init", "--match"),
    ),
    "plan": (
        *("--num-experts", "--num-moe-heads", "--moe-intermediate-size", "--match", "--reference-experts"),
        "--revision",
    ),
    "verify": ("--text", "--dtype", "--max-tokens", "--revision"),
    "eval": ("--limit", "--batch_size", "--num_fewshot", "--device", "--gen_kwargs", "--tasks", "--max_batch_size"),
    "routing": ("--max_tokens", "--batch_size", "--block_size", "--threshold", "--device", "--dtype", "--text"),
    "params": ("--config_overrides", "--paper"),
    "train": (*RUN_OPTIONS, "--distributed_config", "--validation_file"),
    "pretrain": (*NEW_MODEL_OPTIONS, "--num_train_tokens"),
    "compare": (*NEW_MODEL_OPTIONS, "--models", "--seeds"),
}
ODD_WORDS = (
    *("0", "1", "-1", "3", "7", "1.5", "10" * 13, "x", "", "1e9", "nan", "None", "5GB", "-5GB", "main", "a\nb"),
    *("float64", "{text}", "{model}", "{case}/nowhere", "/dev/zero", "x=1", "[1]", '{"a": 1}', "vocab_size=0"),
)
SWITCHES = {"convert": ("--overwrite", "--resume"), "train": ("--overwrite",), "pretrain": ("--overwrite",)}
ODD_OUTPUTS = (
    *("{case}/" + "x" * 300, "{case}/a\0b", "{case}/a\nb", "{case}/new/folder", "{case}/occupied", "{case}/dangling"),
    *("{model}", "{model}/inside", "{text}", "{text}/inside", "/proc/none", "/dev/null", "", ".", "{case}/\udcff"),
)


@st.composite
def cases(draw, bases: dict[str, tuple[Path, list[list[str]]]]) -> Case:
    """One or two edits of a base, and one of the commands for it, with an odd option now and then."""
    base = draw(st.sampled_from(sorted(bases)))
    folder, commands = bases[base]
    command = list(draw(st.sampled_from(commands)))
    made = draw(st.lists(edits(folder), min_size=1, max_size=2))
    oddity = draw(st.integers(0, 11))
    if oddity in (0, 1):
        command += [draw(st.sampled_from(ODD_OPTIONS[command[0]])), draw(st.sampled_from(ODD_WORDS))]
    elif oddity == 2 and command[0] in SWITCHES:
        command.append(draw(st.sampled_from(SWITCHES[command[0]])))
    if oddity in (2, 3) and "{output}" in command:
        command[command.index("{output}")] = draw(st.sampled_from(ODD_OUTPUTS))
    if oddity < 4 and draw(st.booleans()):
        made = []
    return Case(base, command, made)


@st.composite
def valid_models(draw, families: list[str], commands: list[list[str]]) -> Case:
    """A dense model as its family allows it, and its conversion."""
    family = draw(st.sampled_from(families))
    heads = draw(st.sampled_from([2, 4, 6]))
    fields = {
        "hidden_size": draw(st.sampled_from([24, 48, 72])),
        "intermediate_size": draw(st.sampled_from([16, 50, 96, 131])),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 3, 6) if heads % n == 0])),
        "vocab_size": draw(st.sampled_from([128, 131])),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "initializer_range": draw(st.sampled_from([0.02, 0.3])),
    }
    ropes = [None, {"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "linear", "factor": 2.0}]
    ropes += [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}]
    fields["rope_parameters"] = (rope := draw(st.sampled_from(ropes))) and {"rope_theta": 10_000.0, **rope}
    # the head's size is even, for rotations, and some families ask for it
    if draw(st.booleans()) or (fields["hidden_size"] // heads) % 2 or family in ("ministral", "cwm"):
        fields["head_dim"] = draw(st.sampled_from([8, 12]))
    own = {
        "llama": {"attention_bias": st.booleans(), "mlp_bias": st.booleans()},
        "mistral": {"sliding_window": st.sampled_from([None, 1, 5, 4096])},
        "qwen2": {
            "use_sliding_window": st.booleans(),
            "sliding_window": st.just(5),
            "max_window_layers": st.integers(0, 3),
        },
        "qwen3": {"attention_bias": st.booleans()},
        "smollm3": {"no_rope_layer_interval": st.integers(1, 4), "attention_bias": st.booleans()},
    }
    fields |= {name: draw(values) for name, values in own.get(family, {}).items()}
    return Case(family, draw(st.sampled_from(commands)), [], {k: v for k, v in fields.items() if v is not None})
