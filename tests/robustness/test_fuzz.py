"""
Bad input of any kind: one line, a code other than 0, nothing left behind. A few hundred cases, the same each time;
`make fuzz` runs 10,000. A case that fails is made small and written to tests/regressions, where it is run ever after.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from cases import Case, cases, valid_models
from hypothesis import HealthCheck, given, seed, settings
from running import CONVERSIONS, make_bases, run
from tqdm import tqdm

from mhmoe.conversion.families import FAMILIES


CASES = int(os.environ.get("FUZZ_CASES", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
KEEP_GOING = os.environ.get("FUZZ_KEEP_GOING")  # a file: every failure goes there, and none ends the run
REGRESSIONS = Path(__file__).parents[1] / "regressions"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield make_bases(tmp_path_factory.mktemp("bases"))
    datasets.config.HF_DATASETS_CACHE = cache


def run_afresh(case: Case, bases, folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return run(case, bases, folder)


def check_cases(strategy, number: int, bases, folder: Path) -> Counter:
    """Run so many cases; the number of each outcome."""
    counts, failures, seen = Counter(), [], set()
    progress = tqdm(total=number, unit="case", mininterval=10)

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(SEED)
    @given(strategy)
    def check(case: Case):
        text = case.to_json()
        if KEEP_GOING and text in seen:
            return
        seen.add(text)
        outcome = run_afresh(case, bases, folder)
        counts[outcome.kind] += 1
        progress.update()
        progress.set_postfix(counts, refresh=False)
        if outcome.fine:
            return
        if KEEP_GOING:
            for edit in case.edits if len(case.edits) > 1 else ():  # the one that does it
                if (alone := run_afresh(smaller := replace(case, edits=[edit]), bases, folder)).kind == outcome.kind:
                    text, outcome = smaller.to_json(), alone
            failures.append({"kind": outcome.kind, "detail": outcome.detail, "case": json.loads(text)})
            Path(KEEP_GOING).write_text(json.dumps(failures, indent=1))
            return
        REGRESSIONS.mkdir(exist_ok=True)
        (REGRESSIONS / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json").write_text(text)
        pytest.fail(f"{outcome.kind}: {outcome.detail}\n{text}")

    try:
        check()
    finally:
        progress.close()
    return counts


def test_any_input(bases, tmp_path):
    counts = check_cases(cases(bases), CASES, bases, tmp_path / "case")
    assert counts["refused"] > CASES / 4
    assert counts["done"]


def test_any_valid_model(bases, tmp_path):
    counts = check_cases(valid_models(list(FAMILIES), CONVERSIONS), max(CASES // 10, 10), bases, tmp_path / "case")
    assert counts["done"] > counts["refused"]


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*.json")), ids=lambda file: file.stem)
def test_what_failed_once(file, bases, tmp_path):
    outcome = run_afresh(Case.from_json(file.read_text()), bases, tmp_path / "case")
    assert outcome.fine, f"{outcome.kind}: {outcome.detail}"
