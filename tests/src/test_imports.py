"""What is imported when: the command's help and `import mhmoe` wait for neither torch nor transformers."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
from tiny import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto import modeling_auto

import mhmoe
from mhmoe.after_import import after_import
from mhmoe.modeling_mhmoe.modeling_mhmoe import AUTO_MAP
from mhmoe.registration import MODEL_CLASSES


HEAVY = ("torch", "transformers", "numpy", "matplotlib", "pyarrow", "datasets", "huggingface_hub")
COMPILER = ("torch._dynamo", "torch._inductor")
MODELS = ("mhmoe.modeling_mhmoe", "transformers.modeling_utils")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


def loaded(program: str, names: tuple[str, ...]) -> list[str]:
    """Of the modules `names`, those that a fresh Python has imported after `program`."""
    return (
        run(f"{program}\nimport sys\nprint('\\n', *[n for n in {names} if n in sys.modules])").splitlines()[-1].split()
    )


@pytest.mark.parametrize(
    "program",
    [
        "import mhmoe",
        "import mhmoe.evaluation",
        *(
            f"import sys; from mhmoe.cli import main; sys.argv = ['mhmoe', *{words}.split()]\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code"
            for words in ("'--help'", "'--version'", "'params --help'", "'eval --help'", "'routing --help'")
        ),
    ],
)
def test_help_and_the_bare_package_are_light(program):
    assert loaded(program, HEAVY) == []


def test_configuration_comes_without_models_and_a_bare_import_registers_them(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    program = f"""
import sys
import mhmoe.configuration
mhmoe.configuration.costs(mhmoe.configuration.MHMoEConfig.from_preset("p2-smoe"))
print([name for name in {(*MODELS, *COMPILER)} if name in sys.modules])
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(tmp_path)!r})
print(type(config).__module__, config.from_preset.__name__, "mhmoe.modeling_mhmoe" in sys.modules)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__module__)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
print("subtoken" in ALL_EXPERTS_FUNCTIONS.valid_keys())
"""
    assert run(program).splitlines() == [
        "[]",
        "mhmoe.configuration.configuration_mhmoe from_preset False",
        "mhmoe.modeling_mhmoe.modeling_mhmoe",
        "True",
    ]


def test_models_come_without_what_only_packing_needs():
    assert loaded("import mhmoe.modeling_mhmoe.modeling_mhmoe", ("transformers.integrations.bitnet",)) == []


def test_transformers_may_come_first():
    """In this process it did: a tiny model's file imports its Auto classes before this package."""
    assert type(AutoModelForTokenClassification.from_config(tiny_config())) is mhmoe.MHMoEForTokenClassification
    assert AutoModelForCausalLM._model_mapping[mhmoe.MHMoEConfig] is mhmoe.MHMoEForCausalLM
    assert AutoConfig.for_model("mhmoe").from_preset
    assert "subtoken" in ALL_EXPERTS_FUNCTIONS.valid_keys()


def test_classes_stand_in_the_tables_that_tools_look_into():
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mhmoe"] == "MHMoEForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["mhmoe"] == "MHMoEModel"
    assert importlib.import_module("transformers.models.mhmoe").MHMoEForCausalLM is mhmoe.MHMoEForCausalLM


def test_the_names_are_those_of_the_classes():
    assert {name: f"modeling_mhmoe.{model}" for name, model in MODEL_CLASSES.items()} == {
        name: reference for name, reference in AUTO_MAP.items() if name != "AutoConfig"
    }
    for name in mhmoe.__all__:
        assert getattr(mhmoe, name) is not None
    for auto_class, model in MODEL_CLASSES.items():
        assert getattr(mhmoe, model)._auto_class == auto_class
    assert mhmoe.MHMoEConfig._auto_class == "AutoConfig"
    assert set(mhmoe.__all__) <= set(dir(mhmoe))
    with pytest.raises(AttributeError, match="'mhmoe' has no attribute 'MHMoENothing'"):
        mhmoe.MHMoENothing  # noqa: B018


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module to import, not imported yet."""
    (tmp_path / "some_library.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "some_library.py"
    sys.modules.pop("some_library", None)


def test_what_waits_for_an_import_happens_once_it_is_done(library):
    calls = []
    after_import("some_library", lambda module: calls.append(module.VALUE))
    assert importlib.util.find_spec("some_library") is not None  # to look is not to import
    assert calls == []
    import some_library

    assert calls == [1]
    importlib.import_module("some_library")
    assert calls == [1]
    after_import("some_library", lambda module: calls.append(module))
    assert calls == [1, some_library]


def test_an_import_that_failed_can_be_tried_again(library):
    calls = []
    library.write_text("raise ValueError('not today')\n")
    after_import("some_library", lambda module: calls.append(module.VALUE))
    with pytest.raises(ValueError, match="not today"):
        importlib.import_module("some_library")
    library.write_text("VALUE = 22\n")
    importlib.invalidate_caches()
    importlib.import_module("some_library")
    assert calls == [22]
