"""
Bad input of any kind: one line, a code other than 0, nothing left behind. A few hundred cases, the same each time;
`make fuzz` runs 10,000. A case that fails is made small and written to tests/regressions, where it is run ever after.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from cases import Case, cases
from hypothesis import HealthCheck, given, settings
from running import make_bases, run


CASES = int(os.environ.get("FUZZ_CASES", "200"))
KEEP_GOING = os.environ.get("FUZZ_KEEP_GOING")  # a file: every failure goes there, and none ends the run
REGRESSIONS = Path(__file__).parents[1] / "regressions"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def run_afresh(case: Case, bases, folder: Path):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return run(case, bases, folder)


def test_any_input(bases, tmp_path):
    counts, failures, seen = Counter(), [], set()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases(bases))
    def check(case: Case):
        text = case.to_json()
        if KEEP_GOING and text in seen:
            return
        seen.add(text)
        outcome = run_afresh(case, bases, tmp_path / "case")
        counts[outcome.kind] += 1
        if outcome.fine:
            return
        if KEEP_GOING:
            failures.append({"kind": outcome.kind, "detail": outcome.detail, "case": json.loads(text)})
            Path(KEEP_GOING).write_text(json.dumps(failures, indent=1))
            return
        REGRESSIONS.mkdir(exist_ok=True)
        (REGRESSIONS / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json").write_text(text)
        pytest.fail(f"{outcome.kind}: {outcome.detail}\n{text}")

    check()
    print(dict(counts))
    assert counts["refused"] > CASES / 4
    assert counts["done"]


@pytest.mark.parametrize("file", sorted(REGRESSIONS.glob("*.json")), ids=lambda file: file.stem)
def test_what_failed_once(file, bases, tmp_path):
    outcome = run_afresh(Case.from_json(file.read_text()), bases, tmp_path / "case")
    assert outcome.fine, f"{outcome.kind}: {outcome.detail}"
