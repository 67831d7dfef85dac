"""Text files read a piece at a time, and the documents that training makes of them."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from mhmoe.errors import UserError
from mhmoe.text import READ_ERRORS, json_records
from mhmoe.training import load_file


COMPRESSED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(number: int = 300) -> list[dict]:
    """Objects of very different lengths, whose other fields have every type."""
    generator, others = random.Random(0), [None, 3, "three", {"a": [1]}, [], 0.5, {"a": "b"}, True]
    lengths = [generator.choice([0, 10, 1000, 70_000 if index % 100 == 0 else 5]) for index in range(number)]
    return [
        {"id": others[index % 8], "text": f"\u00e9\u2028\n{'x' * length}", **({"late": {}} if index > 250 else {})}
        for index, length in enumerate(lengths)
    ]


LAYOUTS = {
    "lines.jsonl": lambda objects: "\n".join(map(json.dumps, objects)),
    "blank-lines.jsonl": lambda objects: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in objects) + "\n\n",
    "byte-order-mark.jsonl": lambda objects: "\ufeff" + "\n".join(map(json.dumps, objects)),
    "windows.jsonl": lambda objects: "\r\n".join(map(json.dumps, objects)),
    "lines.json": lambda objects: "\n".join(map(json.dumps, objects)),
    "array.json": lambda objects: json.dumps(objects, ensure_ascii=False),
    "pretty-array.json": lambda objects: json.dumps(objects, indent=2),
    "pretty-objects.json": lambda objects: "\n".join(json.dumps(row, indent=2) for row in objects),
}


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_in_any_layout(tmp_path, layout, ending):
    file = tmp_path / (layout + ending)
    file.write_bytes(COMPRESSED[ending](LAYOUTS[layout](rows()).encode()))
    assert [record for _, record in json_records(file)] == rows()
    assert load_file(str(file))["text"][:] == [row["text"] for row in rows()]


def test_lines_are_numbered(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}')
    (tmp_path / "a.json").write_text('\n[\n{"a":\n1},\n\n{"a": 2}]')
    assert list(json_records(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(json_records(tmp_path / "a.json")) == [(3, {"a": 1}), (6, {"a": 2})]
    (tmp_path / "strings.json").write_text('["a", "b"]')
    assert load_file(str(tmp_path / "strings.json"))["text"][:] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "line 3: 'utf-8' codec"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: holds no JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: maximum recursion depth"),
        ("a.jsonl", b'{"text": "a"} {"text": "b"}\n', "line 1: Extra data"),
        ("a.json", b'[{"text": "a"},\n{"text": 1 2}]', "line 2: Expecting ','"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "line 2: the array does not end"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2: no comma between"),
        ("a.json", b'[{"text": "a"}]\n[]', "line 2: something follows the array"),
        ("a.json", b'[{"text": "a"},\n3]', "line 2: holds no JSON object"),
        ("a.json", b'{"text": "a"}\n{"text": "' + b"x" * 200_000, "line 2: Unterminated string"),
        ("a.json", b'[{"text": "a"},\n{"text": "' + b"x" * 200_000 + b'\xff"}]', "line 2 or a later one: 'utf-8'"),
    ],
)
def test_broken_line_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(json_records(file))
    with pytest.raises(UserError) as error:
        load_file(str(file))
    assert str(error.value).startswith(f"{file}: cannot be read as json (line ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_number_of_any_length(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a", "id": ' + "9" * 5000 + ', "other": 12}')
    ((_, record),) = json_records(tmp_path / name)
    assert (record["text"], record["other"]) == ("a", 12)
    assert load_file(str(tmp_path / name))["text"][:] == ["a"]


def test_many_columns_are_one_short_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({f"column{number}": "" for number in range(1000)}))
    with pytest.raises(UserError, match=r"column19, 980 more$"):
        load_file(str(file))


@pytest.mark.parametrize("ending", [ending for ending in COMPRESSED if ending])
def test_cut_archive(tmp_path, ending):
    file = tmp_path / f"a.jsonl{ending}"
    data = COMPRESSED[ending](LAYOUTS["lines.jsonl"](rows()).encode())
    file.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(READ_ERRORS):
        list(json_records(file))
    with pytest.raises(UserError, match="cannot be read as json"):
        load_file(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}\n{"body": "a"}\n', "has no column 'text' (text_column); its columns are id, body"),
        ('{"text": "a"}\n\n{"text": ["b"]}\n', "column 'text' (text_column) holds list in line 3, not text"),
        ("\n\n", "there is no text in it"),
    ],
)
def test_column_without_text(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        load_file(str(tmp_path / "a.jsonl"))
    assert message in str(error.value)


def test_row_without_text_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"text": null}\n{"text": "a"}\n')
    assert load_file(str(tmp_path / "a.jsonl"))["text"][:] == [None, None, "a"]


def test_other_fields_may_change_in_the_middle_of_a_large_file(tmp_path):
    file, padding = tmp_path / "large.jsonl", "x" * 1000
    with open(file, "w") as stream:
        for index in range(26_000):
            other = index if index < 13_000 else {"now": [index]}
            stream.write(json.dumps({"other": other, "text": f"{index} {padding}"}) + "\n")
    assert file.stat().st_size > 26e6
    texts = load_file(str(file))
    assert len(texts) == 26_000
    assert texts[25_999]["text"] == f"25999 {padding}"


@pytest.mark.parametrize("layout", ["lines.jsonl", "array.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, layout):
    def peak(number: int) -> int:
        file: Path = tmp_path / f"{number}-{layout}"
        file.write_text(LAYOUTS[layout]([{"text": "x" * 10_000}] * number))
        tracemalloc.start()
        assert sum(1 for _ in json_records(file)) == number
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(2000) < 2 * peak(100)


def test_changed_file_is_read_anew(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}')
    assert load_file(str(file))["text"][:] == ["a"]
    file.write_text('{"text": "bc"}')
    assert load_file(str(file))["text"][:] == ["bc"]
    assert load_file(str(tmp_path / "." / "a.jsonl"))["text"][:] == ["bc"]
