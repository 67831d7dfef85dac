"""Fetch transformers' own tests: the folder `tests` of the source distribution of the installed version."""

import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path


HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "upstream"
PACKAGE = "transformers_tests"

# What those tests import from parts of the library's tree that the source distribution does not carry.
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    # a value other than the default for every field that each config of the library has
    "utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "architectures": ["AnyModel"],
    "chunk_size_feed_forward": 4,
    "dtype": "float16",
    "id2label": {0: "only"},
    "label2id": {"only": 0},
    "output_hidden_states": True,
    "problem_type": "multi_label_classification",
    "return_dict": False,
}
""",
    "distributed_testing_utils.py": (HERE / "distributed_stand_in.py").read_text(),
}


def fetch_upstream_tests() -> Path:
    """
    The folder that holds the package `transformers_tests`, downloaded on the first call for a version of transformers.

    Raises:
        subprocess.CalledProcessError: pip could not download the source distribution; it has said why.
    """
    version = metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    package = folder / PACKAGE
    if not package.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
            subprocess.run([*pip, "--dest", partial, f"transformers=={version}"], check=True)
            (archive,) = Path(partial).glob("transformers-*.tar.gz")
            shutil.unpack_archive(archive, partial)
            shutil.move(Path(partial) / archive.name.removesuffix(".tar.gz") / "tests", package)
    for name, source in STAND_INS.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return folder
