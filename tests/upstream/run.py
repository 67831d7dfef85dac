"""
Measure MH-MoE by transformers' own tests: `python tests/upstream/run.py`. Arguments go to pytest, e.g. `-k rope -n 0`.

Exits with 0 if every case of MH-MoE passed or is accounted for: left out or skipped for a reason that is listed, and
not skipped where Mixtral's runs. Wants the test files of transformers 5.23 or newer: 5.20 and before lack some.
"""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from fetch import HERE, PACKAGE, fetch_upstream_tests
from left_out import LEFT_OUT_CASES, LEFT_OUT_FILES, SKIPPED_BUT_NOT_FOR_MIXTRAL, USED_FILES


YARDSTICK = "Mixtral"
STATUSES = ("passed", "skipped", "left out", "failed")


class Recorder:
    """Collects for every model what became of each case, and why; of a case's parts the worst counts."""

    def __init__(self):
        self.outcomes = defaultdict(dict)  # {model: {case: (status, reason)}}

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        model, case = report.nodeid.split("::")[1:]
        status, reason = report.outcome, ""
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            status = "left out" if case in LEFT_OUT_CASES else "skipped"
        before = self.outcomes[model].get(case, ("passed", ""))
        self.outcomes[model][case] = max(before, (status, reason), key=lambda outcome: STATUSES.index(outcome[0]))

    def failed(self, model: str) -> list[str]:
        return [case for case, (status, _) in self.outcomes[model].items() if status == "failed"]

    def skipped(self, model: str) -> dict[str, str]:
        return {case: reason for case, (status, reason) in self.outcomes[model].items() if status == "skipped"}


def unnamed_files(package: Path) -> list[str]:
    """Files of upstream tests that neither run nor have a reason for being left out."""
    return sorted({path.name for path in package.glob("test_*.py")} - USED_FILES - LEFT_OUT_FILES.keys())


def print_summary(recorder: Recorder) -> list[str]:
    """Print what ran and what did not, and return the cases that MH-MoE skips and Mixtral does not, unexplained."""
    models = sorted(recorder.outcomes)
    heading = f"transformers {metadata.version('transformers')}"
    print(f"\n{heading:24}" + "".join(f"{model:>10}" for model in models))
    for status in STATUSES:
        counts = [sum(outcome[0] == status for outcome in recorder.outcomes[model].values()) for model in models]
        print(f"{status:24}" + "".join(f"{count:10}" for count in counts))

    print("\nLeft out, for what it tests or needs")
    for name, reason in {**LEFT_OUT_CASES, **LEFT_OUT_FILES}.items():
        print(f"  {name}: {reason}")

    print(f"\nSkipped by the tests themselves, for {YARDSTICK} too")
    yardstick = recorder.skipped(YARDSTICK)
    for reason, count in Counter(yardstick.values()).most_common():
        print(f"  {count:3}  {reason}")

    unexplained = []
    print(f"\nSkipped where {YARDSTICK} is not")
    for model in models:
        for case, reason in recorder.skipped(model).items():
            if case not in yardstick and case in recorder.outcomes[YARDSTICK]:
                print(f"  {model} {case}: {reason} ({SKIPPED_BUT_NOT_FOR_MIXTRAL.get(case, 'UNEXPLAINED')})")
                if case not in SKIPPED_BUT_NOT_FOR_MIXTRAL:
                    unexplained.append(case)
    return unexplained


def main() -> int:
    try:
        folder = fetch_upstream_tests()
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not download the source distribution of transformers: {error}")
    if unnamed := unnamed_files(folder / PACKAGE):
        sys.exit(f"transformers brings new test files, to be named in {HERE / 'left_out.py'}: {', '.join(unnamed)}")
    # Workers and the ranks of distributed cases are processes of their own: what they need travels in the environment.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(folder))
    options = ["--disable-warnings", "-p", "no:cacheprovider", "-o", "verbosity_subtests=0", "-n", str(os.cpu_count())]
    recorder = Recorder()
    status = pytest.main([str(HERE / "suite.py"), *options, *sys.argv[1:]], plugins=[recorder])
    unexplained = print_summary(recorder)
    if status != pytest.ExitCode.TESTS_FAILED:
        return int(status) or len(unexplained) > 0
    failed = {model: recorder.failed(model) for model in recorder.outcomes}
    print("\nFailed")
    for model, cases in failed.items():
        print(*(f"  {model} {case}" for case in cases), sep="\n", end="\n" * bool(cases))
    # Mixtral's own are the library's: on some processors its tolerances are too narrow for itself
    return any(cases for model, cases in failed.items() if model != YARDSTICK) or len(unexplained) > 0


if __name__ == "__main__":
    sys.exit(main())
