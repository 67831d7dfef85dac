"""The command line in this process, and what a user's mistake looks like there."""

import sys

from mhmoe import cli


def run(capsys, monkeypatch, *arguments) -> tuple[int, str]:
    """Exit status and what went to standard error, progress bars left out."""
    monkeypatch.setattr(sys, "argv", ["mhmoe", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = 1 if isinstance(stop.code, str) else stop.code or 0
    else:
        status = 0
    return status, capsys.readouterr().err


def assert_one_line(status: int, errors: str, named: str) -> None:
    lines = [line for line in errors.splitlines() if "it/s]" not in line and "B/s]" not in line and line.strip()]
    assert status != 0
    assert len(lines) == 1, errors
    assert lines[0].startswith("mhmoe: error: ")
    assert named in lines[0]
