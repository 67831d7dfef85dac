"""
Test with other versions of transformers: `python tests/versions/run.py VERSION ...`, or all that are known.

A version is a file beside this one, which lists what is installed for it over the packages of the environment that
runs this; so torch is there once. The oldest version runs all of the project's tests unless `--reduced` is given, the
others those of `test_use.py`; versions that are too old have to say so in one line.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from packaging.version import Version


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-versions"
OLDEST = Version("5.12.1")
VERSIONS = sorted(Version(file.stem) for file in HERE.glob("*.txt"))


def make_environment(version: Version) -> Path:
    """The interpreter of an environment that has what the file of `version` lists, and all else from this one."""
    folder, wanted = ENVIRONMENTS / str(version), (HERE / f"{version}.txt").read_text()
    python = folder / "bin" / "python"
    installed = folder / "installed.txt"
    if python.exists() and installed.is_file() and installed.read_text() == wanted:
        return python
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, base = (
        subprocess.run([interpreter, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        for interpreter in (python, sys.executable)
    )
    # not by its path alone: what is installed editable is there only through the .pth files of the folder
    (Path(own) / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--requirement", HERE / f"{version}.txt"], check=True)
    installed.write_text(wanted)
    return python


def refuses(python: Path, folder: Path) -> bool:
    """Whether loading a saved model ends, without this package, in one line that names the version needed."""
    load = (
        "import sys; sys.modules['mhmoe'] = None; from transformers import AutoModelForCausalLM; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules}
        completed = subprocess.run([python, "-c", load, folder], env=environment, capture_output=True, text=True)
    last_line = completed.stderr.rstrip().rpartition("\n")[2]
    print(last_line)
    return last_line.startswith("ImportError: transformers>=5.12 is required")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("versions", nargs="*", type=Version, default=VERSIONS)
    parser.add_argument("--reduced", action="store_true", help="test_use.py alone for the oldest version too")
    arguments = parser.parse_args()
    # models and their logits, from the newest version, for the others to load
    os.environ["MHMOE_SAVED"] = saved = str(ENVIRONMENTS / "saved")
    subprocess.run([sys.executable, HERE / "saved_models.py", saved], check=True, cwd=ROOT)
    failed = []
    for version in arguments.versions:
        print(f"\ntransformers {version}", flush=True)
        python = make_environment(version)
        if version < OLDEST:
            passed = refuses(python, Path(saved) / "plain")
        else:
            whole = version == OLDEST and not arguments.reduced
            tests = ["tests", "--numprocesses", "auto"] if whole else [HERE / "test_use.py"]
            passed = not subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT).returncode
        if not passed:
            failed.append(str(version))
    if failed:
        print(f"\nfailed with transformers {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
