"""
Measure encoders with MH-MoE layers by transformers' own tests, beside their dense twins:
`python tests/upstream/run_encoders.py`. Arguments go to pytest, e.g. `-k vit`.

Exits with 0 if every case that a dense model passes, its twin passes too.
"""

import os
import sys

import pytest
from fetch import HERE, fetch_upstream_tests
from run import STATUSES, Recorder


def main() -> int:
    folder = fetch_upstream_tests()
    support = HERE.parent / "support"
    for place in (folder, support):
        sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (folder, HERE, support, os.environ.get("PYTHONPATH", ""))))
    recorder = Recorder()
    options = ["--disable-warnings", "-q", "--tb=line", "-p", "no:cacheprovider"]
    pytest.main([str(HERE / "encoders_suite.py"), *options, *sys.argv[1:]], plugins=[recorder])
    worse = []
    for model in sorted(recorder.outcomes):
        counts = {
            status: sum(found == status for found, _ in recorder.outcomes[model].values()) for status in STATUSES
        }
        print(f"{model:32}" + ", ".join(f"{count} {status}" for status, count in counts.items()))
        if not model.endswith("_dense"):
            own = set(recorder.failed(model)) - set(recorder.failed(f"{model}_dense"))
            worse += [f"{model} {case}" for case in sorted(own)]
    print(*(f"fails, and the dense model does not: {case}" for case in worse), sep="\n")
    return len(worse) > 0 or not recorder.outcomes


if __name__ == "__main__":
    sys.exit(main())
