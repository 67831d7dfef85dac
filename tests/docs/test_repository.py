"""Files about the repository that nothing else reads: what they say of other files is true."""

import re

import yaml
from pages import pages
from paths import ROOT

from mhmoe.version import __version__


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_stays_short():
    assert len(text_of("README.md").splitlines()) <= 120


def test_links_between_pages_lead_somewhere():
    """On GitHub; `make docs` checks them on the site."""
    for page in [*pages(), "CONTRIBUTING.md", "CHANGELOG.md"]:
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text_of(page)):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"\n## {__version__} " in text_of("CHANGELOG.md")


def test_pre_commit_has_the_ruff_of_ci():
    (repository,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert f"\nruff=={repository['rev'].removeprefix('v')}\n" in text_of("constraints.txt")


def test_the_workflow_calls_targets_of_the_makefile():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
    assert len(commands) == len(jobs)
    for command in commands:
        make, target, *_ = command.split()
        assert make == "make"
        assert target in targets
