"""Code that a tokenizer brings: left out of what is converted, or copied with it where the user trusts it."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from mhmoe import modeling_mhmoe
from mhmoe.errors import UserError, one_line
from mhmoe.files import write_json
from mhmoe.intake import check_file, read_json


FIELD = "auto_map"
OURS = {file.name for file in Path(modeling_mhmoe.__path__[0]).glob("*.py")}


def tokenizer_code(folder: Path) -> list[str]:
    """
    The names of the files with code that the tokenizer in `folder` asks for, those that they import included.

    Raises:
        UserError: one is not in `folder`, or has the name of a file of the model's own code.
    """
    file = folder / TOKENIZER_CONFIG_FILE
    auto_map = read_json(file).get(FIELD) if file.is_file() else None
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    references = [name for name in (classes if isinstance(classes, list) else [classes]) if name is not None]
    found: list[str] = []
    for reference in references:
        if not isinstance(reference, str) or "--" in reference or reference.count(".") != 1:
            raise UserError(
                f"{file}: {FIELD} names {one_line(reference)}, which is no MODULE.CLASS of this folder; get the "
                "code's files, and name them so"
            )
        _add(f"{reference.partition('.')[0]}.py", folder, found)
    return sorted(found)


def _add(name: str, folder: Path, found: list[str]) -> None:
    if name in found:
        return
    if name != Path(name).name or name in OURS:
        raise UserError(f"{folder / name}: code of the tokenizer may not have this name; rename it")
    check_file(folder / name, folder)
    found.append(name)
    for module in get_relative_imports(folder / name):
        _add(f"{module}.py", folder, found)


def drop_tokenizer_code(folder: Path) -> bool:
    """Make the tokenizer in `folder` name no code of its own; whether it did."""
    return drop_code(folder / TOKENIZER_CONFIG_FILE)


def drop_code(file: Path) -> bool:
    """Make a JSON file, where it is there, name no code; whether it did."""
    values = read_json(file) if file.is_file() else {}
    if FIELD not in values:
        return False
    del values[FIELD]
    write_json(file, values)
    return True
