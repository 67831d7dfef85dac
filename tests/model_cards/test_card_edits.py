"""What `mhmoe eval --update_card` and `mhmoe verify --update-card` do to a card: their part, and all else stays."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe.conversion import Verification, keep_figures
from mhmoe.evaluation.card import add_results


ANY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
VALUES = st.one_of(st.integers(0, 1), st.floats(0, 1))
LINES = ["", "words", "## Verified", "## Training", "---", "```", "- a", r"\1 $0 {{ x }}", "<!-- mhmoe: status -->"]
TEXTS = st.lists(st.sampled_from([*LINES, "caf\u00e9 \u2028 \x85", "\ufeff"])).map("\n".join)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "license": st.sampled_from(["mit", "other"]),
        "tags": st.lists(st.sampled_from(["moe", "no", "1.0", "\u00e9"]), unique=True),
        "model_name": st.just("mine"),
        "widget": st.just([{"text": "a: b\n", "example": None}]),
        "date": st.just(yaml.safe_load("2026-01-02")),
    },
)
DATA_SETS = ["org/data", "own"]
METRICS = st.fixed_dictionaries(
    {"type": st.sampled_from(["acc", "f1"]), "value": st.one_of(VALUES, st.just("20 \u00b1 1"))},
    optional={"name": st.sampled_from(["a acc (0-shot)", "Accuracy"]), "verified": st.just(True)},
)
ENTRIES = st.fixed_dictionaries(
    {
        "task": st.just({"type": "text-generation"}),
        "dataset": st.fixed_dictionaries(
            {"type": st.sampled_from(DATA_SETS), "name": st.sampled_from(["Data", "a"])},
            optional={"split": st.just("test"), "args": st.just({"n": 1})},
        ),
        "metrics": st.lists(METRICS, min_size=1, max_size=3),
    },
    optional={"source": st.just({"url": "https://example.org", "name": "A paper"})},
)
INDEXES = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from(["One", "Two"]), "results": st.lists(ENTRIES, max_size=3)}),
    max_size=2,
)
SHOTS = st.integers(0, 1)
RESULTS = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(st.sampled_from(DATA_SETS), SHOTS, st.dictionaries(st.sampled_from(["acc", "f1"]), VALUES)),
    min_size=1,
)


def lm_eval_results(tasks: dict[str, tuple[str, int, dict[str, float]]]) -> dict:
    """As lm-eval gives them."""
    return {
        "configs": {task: {"dataset_path": path, "test_split": "test"} for task, (path, _, _) in tasks.items()},
        "results": {
            task: {"alias": task, **{f"{metric},none": value for metric, value in metrics.items()}}
            for task, (_, _, metrics) in tasks.items()
        },
        "n-samples": {task: {"original": 9, "effective": 9} for task in tasks},
        "n-shot": {task: shots for task, (_, shots, _) in tasks.items()},
    }


def figures(metadata: dict) -> list[tuple]:
    """Every metric of a model-index, with all that is said of it."""
    return [
        (model["name"], entry["task"], entry["dataset"], entry.get("source"), metric)
        for model in metadata.get("model-index") or ()
        for entry in model["results"]
        for metric in entry["metrics"]
    ]


def write_card(folder: str, metadata: dict, text: str, line_end: str) -> Path:
    card = Path(folder, "README.md")
    front = f"---\n{yaml.safe_dump(metadata, allow_unicode=True)}---\n" if metadata else ""
    card.write_bytes(f"{front}# Card\n{text}".replace("\n", line_end).encode())
    return card


@ANY
@given(METADATA, INDEXES, TEXTS, st.sampled_from(["\n", "\r\n"]), RESULTS, RESULTS)
def test_results_replace_their_own_figures_alone(metadata, index, text, line_end, first, second):
    with tempfile.TemporaryDirectory() as folder:
        card = write_card(folder, {**metadata, **({"model-index": index} if index else {})}, text, line_end)
        before = ModelCard.load(card)
        for tasks in (first, second):
            earlier = figures(metadata_load(card) or {})
            add_results(folder, lm_eval_results(tasks))
            once = card.read_bytes()
            add_results(folder, lm_eval_results(tasks))
            assert card.read_bytes() == once
            after = ModelCard.load(card)
            assert after.text == before.text
            made = metadata_load(card)
            index_of_it = made.pop("model-index")
            assert made == metadata
            kept = figures({"model-index": index_of_it})
            named = {metric.get("name"): metric["value"] for *_, metric in kept}
            for task, (_, shots, metrics) in tasks.items():
                for metric, value in metrics.items():
                    assert named[f"{task} {metric} ({shots}-shot)"] == value
            replaced = {
                (path if "/" in path else task, metric, f"{task} {metric} ({shots}-shot)")
                for task, (path, shots, metrics) in tasks.items()
                for metric in metrics
            }
            for figure in earlier:
                _, _, data, _, metric = figure
                is_replaced = (data["type"], metric["type"], metric.get("name")) in replaced
                assert figure in kept or (is_replaced and data.get("split") == "test")


VERIFICATIONS = st.builds(
    Verification,
    strategy=st.sampled_from(["exact", "random"]),
    dtype=st.just("float32"),
    tokens=st.integers(1, 10**6),
    max_logit_difference=st.floats(),
    max_padded_logit_difference=st.floats(0, 1),
    same_greedy_text=st.booleans(),
    dense_perplexity=st.floats(1, 1e9),
    mhmoe_perplexity=st.floats(1, 1e9),
    changed_tensors=st.just(()),
)


@ANY
@given(TEXTS, st.sampled_from(["\n", "\r\n"]), VERIFICATIONS, VERIFICATIONS, RESULTS)
def test_verification_keeps_the_card_and_the_report(text, line_end, first, second, results):
    with tempfile.TemporaryDirectory() as folder:
        report = {"strategy": "exact", "figures": {"a": [1, 2.5, None]}}
        Path(folder, "conversion.json").write_text(json.dumps(report))
        # no section that is found by its heading, which the edit would take the place of
        card = write_card(folder, {"license": "mit"}, text.replace("## Verified", "## Words"), line_end)
        before = card.read_bytes()
        keep_figures(first, folder)
        once = card.read_bytes()
        keep_figures(first, folder)
        assert card.read_bytes() == once
        assert once.startswith(before.rstrip(b"\r\n"))
        assert first.table().replace("\n", line_end).encode() in once
        assert (b"\r\n" in once) == (line_end == "\r\n")
        keep_figures(second, folder)
        keep_figures(first, folder)
        assert card.read_bytes() == once
        kept = json.loads(Path(folder, "conversion.json").read_text())
        same = replace(first, changed_tensors=())
        assert repr(kept.pop("verification")["max_logit_difference"]) == repr(same.max_logit_difference)
        assert kept == report
        # and the two commands leave each other's part alone
        add_results(folder, lm_eval_results(results))
        both = card.read_bytes()
        keep_figures(second, folder)
        keep_figures(first, folder)
        assert card.read_bytes() == both
        add_results(folder, lm_eval_results(results))
        assert card.read_bytes() == both
