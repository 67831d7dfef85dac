"""Folders and Hub repositories that load where `mhmoe` is not installed, and the same classes where it is."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import mhmoe


CODE = {"configuration_mhmoe.py", *(path.name for path in (ROOT / "modeling_mhmoe").glob("[a-z]*.py"))}
HEADS = {
    "AutoModel": (AutoModel, mhmoe.MHMoEModel),
    "AutoModelForCausalLM": (AutoModelForCausalLM, mhmoe.MHMoEForCausalLM),
    "AutoModelForSequenceClassification": (AutoModelForSequenceClassification, mhmoe.MHMoEForSequenceClassification),
    "AutoModelForTokenClassification": (AutoModelForTokenClassification, mhmoe.MHMoEForTokenClassification),
    "AutoModelForQuestionAnswering": (AutoModelForQuestionAnswering, mhmoe.MHMoEForQuestionAnswering),
}
REPOSITORY = "an-organisation/mh-moe.tiny"
FIELDS = {
    "num_moe_heads": 4,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": [0],
    "initializer_range": 0.1,
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def make(auto_class: str):
    torch.manual_seed(0)
    model = HEADS[auto_class][1](tiny_config(**FIELDS)).eval()
    if model.can_generate():
        model.generation_config.update(max_new_tokens=7, do_sample=True, temperature=0.5, eos_token_id=[2, 5])
    return model


def outputs_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 13)[None])[0]


@dataclass
class PushedCommit:
    """What one `create_commit` would have sent, kept in a folder."""

    folder: Path
    repositories: list[str]


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    """Stands in for the Hub client's upload: everything that it is given lands in a folder."""
    pushed = PushedCommit(tmp_path_factory.mktemp("hub"), [])

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        pushed.repositories.append(repo_id)
        for operation in operations:
            target = pushed.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                target.write_bytes(content.read())
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0", commit_message="", commit_description="", oid="0"
        )

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("the repository is new")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", create_repo)
        patch.setattr(HfApi, "create_commit", create_commit)
        patch.setattr(ModelCard, "load", no_card)
        yield pushed


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A folder for each class, one in shards and one of the config alone."""
    root = tmp_path_factory.mktemp("saved")
    for auto_class in HEADS:
        make(auto_class).save_pretrained(root / auto_class)
    make("AutoModelForCausalLM").save_pretrained(root / "sharded", max_shard_size="20KB")
    tiny_config(**FIELDS).save_pretrained(root / "AutoConfig")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def pushed(upload) -> Path:
    """The files of `push_to_hub`."""
    make("AutoModelForCausalLM").push_to_hub(REPOSITORY)
    assert upload.repositories == [REPOSITORY]
    return upload.folder


class Remote:
    """A process where `mhmoe` is not installed loads sources: its reports on them, and what it saved again."""

    def __init__(self, root: Path, sources: dict[str, tuple[str, str]], **environment: str):
        self.root = root
        jobs = [
            {
                "source": source,
                "auto_class": auto_class,
                "report": str(self.report_file(name)),
                "resaved": str(self.folder(name)),
            }
            for name, (source, auto_class) in sources.items()
        ]
        (root / "jobs.json").write_text(json.dumps(jobs))
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        completed = subprocess.run(
            [sys.executable, str(SUPPORT / "without_mhmoe.py"), str(root / "jobs.json")],
            env={**inherited, "HF_MODULES_CACHE": str(root / "modules"), **environment},
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stderr[-4000:]

    def folder(self, name: str) -> Path:
        return self.root / name

    def report_file(self, name: str) -> Path:
        return self.root / f"{name}.pt"

    def report(self, name: str) -> dict:
        report = torch.load(self.report_file(name))
        assert "error" not in report, report["error"]
        return report


LOADED = {**{name: name for name in HEADS}, "sharded": "AutoModelForCausalLM", "hub": "AutoModelForCausalLM"}


@pytest.fixture(scope="module")
def remote(saved, pushed, tmp_path_factory) -> Remote:
    """Every saved folder, and the pushed files as the Hub client's cache would hold them."""
    root = tmp_path_factory.mktemp("remote")
    repository = root / "hub_cache" / f"models--{REPOSITORY.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(pushed, repository / "snapshots" / commit)
    sources = {name: (str(saved[name]), auto_class) for name, auto_class in LOADED.items() if name != "hub"}
    sources["hub"] = (REPOSITORY, "AutoModelForCausalLM")
    sources["AutoConfig"] = (str(saved["AutoConfig"]), "AutoConfig")
    sources["new_head"] = (str(saved["AutoModelForCausalLM"]), "AutoModelForSequenceClassification")
    return Remote(root, sources, HF_HUB_CACHE=str(root / "hub_cache"), HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def remote_again(remote, tmp_path_factory) -> Remote:
    """What was saved without `mhmoe`, loaded in another process without it."""
    names = {**LOADED, "AutoConfig": "AutoConfig"}
    sources = {name: (str(remote.folder(name)), auto_class) for name, auto_class in names.items()}
    return Remote(tmp_path_factory.mktemp("remote_again"), sources)


class TestSavedFolder:
    @pytest.mark.parametrize("auto_class", HEADS)
    def test_files(self, saved, auto_class):
        generation = {"generation_config.json"} if auto_class == "AutoModelForCausalLM" else set()
        assert files_of(saved[auto_class]) == {"config.json", "model.safetensors"} | generation | CODE

    def test_config_alone(self, saved):
        assert files_of(saved["AutoConfig"]) == {"config.json", "configuration_mhmoe.py"}

    def test_shards(self, saved):
        shards = {name for name in files_of(saved["sharded"]) if name.endswith(".safetensors")}
        assert len(shards) > 2
        assert "model.safetensors" not in shards
        index = json.loads((saved["sharded"] / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == shards
        assert index["weight_map"].keys() == load_file(saved["AutoModelForCausalLM"] / "model.safetensors").keys()

    def test_auto_map_names_every_class(self, saved):
        expected = {name: f"modeling_mhmoe.{model_class.__name__}" for name, (_, model_class) in HEADS.items()}
        for name in HEADS:
            config = json.loads((saved[name] / "config.json").read_text())
            assert config["auto_map"] == expected | {"AutoConfig": "configuration_mhmoe.MHMoEConfig"}
            assert config["architectures"] == [HEADS[name][1].__name__]

    def test_code_is_the_project_s_own(self, saved):
        folder = saved["AutoModelForCausalLM"]
        for name in CODE:
            source = "configuration" if name == "configuration_mhmoe.py" else "modeling_mhmoe"
            assert (folder / name).read_text() == (ROOT / source / name).read_text()

    @pytest.mark.parametrize("name", sorted(CODE))
    def test_code_imports_only_what_a_stranger_has(self, saved, name):
        folder = saved["AutoModelForCausalLM"]
        allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.partition(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert (folder / f"{node.module}.py").is_file()

    def test_trainer_saves_the_code_too(self, tmp_path):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        Trainer(model=make("AutoModelForCausalLM"), args=arguments, processing_class=tiny_tokenizer()).save_model()
        tokenizer = {"tokenizer.json", "tokenizer_config.json"}
        weights = {"config.json", "model.safetensors", "generation_config.json", "training_args.bin"}
        assert files_of(tmp_path) == weights | tokenizer | CODE
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["auto_map"]["AutoModelForSequenceClassification"].endswith("MHMoEForSequenceClassification")


class TestPush:
    def test_sends_what_save_pretrained_writes(self, saved, pushed):
        """And transformers' own blank model card, which a repository that has a card keeps instead."""
        folder = saved["AutoModelForCausalLM"]
        assert files_of(pushed) == files_of(folder) | {"README.md"}
        for name in files_of(folder):
            assert (pushed / name).read_bytes() == (folder / name).read_bytes(), name

    def test_saving_with_push_to_hub_sends_the_same(self, saved, upload, pushed, tmp_path, monkeypatch):
        monkeypatch.setattr(upload, "folder", tmp_path / "hub")
        make("AutoModelForCausalLM").save_pretrained(tmp_path / "here", push_to_hub=True, repo_id=REPOSITORY)
        expected = files_of(saved["AutoModelForCausalLM"]) | {"README.md"}
        assert files_of(tmp_path / "hub") == files_of(tmp_path / "here") == expected

    def test_config_alone(self, upload, pushed, tmp_path, monkeypatch):
        monkeypatch.setattr(upload, "folder", tmp_path)
        tiny_config().push_to_hub(REPOSITORY)
        assert files_of(tmp_path) == {"config.json", "configuration_mhmoe.py", "README.md"}


class TestWithoutMHMoE:
    @pytest.mark.parametrize("name", LOADED)
    def test_loads_with_the_same_outputs(self, remote, name):
        model = make(LOADED[name])
        report = remote.report(name)
        assert report["class"] == type(model).__name__
        assert report["module"].startswith("transformers_modules.")
        assert report["config_class"] == "MHMoEConfig"
        torch.testing.assert_close(report["outputs"], outputs_of(model))

    @pytest.mark.parametrize("name", LOADED)
    def test_what_was_loaded_can_be_saved_and_loaded_again(self, remote, remote_again, name):
        assert files_of(remote.folder(name)) >= CODE
        assert remote_again.report(name)["class"] == remote.report(name)["class"]
        torch.testing.assert_close(remote_again.report(name)["outputs"], remote.report(name)["outputs"])

    @pytest.mark.parametrize("auto_class", HEADS)
    def test_saving_again_writes_the_same_folder(self, remote, saved, auto_class):
        resaved = remote.folder(auto_class)
        assert files_of(resaved) == files_of(saved[auto_class])
        for name in files_of(resaved):
            assert (resaved / name).read_bytes() == (saved[auto_class] / name).read_bytes(), name

    def test_a_new_head_on_a_language_model(self, remote):
        report = remote.report("new_head")
        assert report["class"] == "MHMoEForSequenceClassification"
        assert report["outputs"].shape == (1, 3)
        weights = load_file(remote.folder("new_head") / "model.safetensors")
        expected = make("AutoModelForCausalLM").state_dict()
        for name in weights.keys() - {"score.weight"}:
            assert torch.equal(weights[name], expected[name]), name

    def test_config_alone(self, remote, remote_again, saved):
        expected = tiny_config(**FIELDS).to_dict()
        for report in (remote.report("AutoConfig"), remote_again.report("AutoConfig")):
            assert report["class"] == "MHMoEConfig"
            assert report["module"].startswith("transformers_modules.")
            for field in expected.keys() - {"_name_or_path", "auto_map"}:
                assert report["config"][field] == expected[field], field
        assert files_of(remote.folder("AutoConfig")) == files_of(saved["AutoConfig"])

    @pytest.mark.parametrize("name", ["AutoModelForCausalLM", "sharded", "hub"])
    def test_generation_config_is_kept(self, remote, remote_again, name):
        for report in (remote.report(name), remote_again.report(name)):
            generation = report["generation_config"]
            assert (generation["max_new_tokens"], generation["temperature"]) == (7, 0.5)
            assert generation["eos_token_id"] == [2, 5]

    def test_labels_are_kept(self, remote, remote_again):
        for process in (remote, remote_again):
            report = process.report("AutoModelForSequenceClassification")
            assert report["config"]["id2label"] == FIELDS["id2label"]
            assert report["outputs"].shape == (1, 3)


VARIANTS = {
    "P1": {
        "num_moe_heads": 4,
        "gated_mlp": False,
        "router_type": "xmoe",
        "head_merge_bias": True,
        "head_merge_init": "xavier",
        "sub_token_residual": True,
        "router_bias_update_rate": 0.01,
    },
    "sigmoid": {"num_moe_heads": 1, "router_type": "xmoe", "scoring_func": "sigmoid", "merge_layer_depth": 2},
    "conv1d": {"token_split": "conv1d", "conv_kernel_size": 5},
    "LatentMoE": {"num_moe_heads": 1, "moe_latent_size": 16, "router_input": "token"},
    "private experts": {
        "num_moe_heads": 4,
        "private_experts": True,
        "experts_type": "two_matrix",
        "router_bias_update_rate": 0.01,
    },
    "bitnet": {"use_bitnet": True, "mlp_only_layers": [0]},
    "packed": {"use_bitnet": True, "mlp_only_layers": [0]},
    "packed two matrices": {"use_bitnet": True, "gated_mlp": False, "shared_expert_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def remote_variants(tmp_path_factory) -> Remote:
    root = tmp_path_factory.mktemp("variants")
    for name, fields in VARIANTS.items():
        model = tiny_model(**fields)
        save = model.save_packed if name.startswith("packed") else model.save_pretrained
        save(root / name / "saved")
    sources = {name: (str(root / name / "saved"), "AutoModelForCausalLM") for name in VARIANTS}
    return Remote(tmp_path_factory.mktemp("remote_variants"), sources)


class TestVariantsWithoutMHMoE:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_loads_with_the_same_outputs(self, remote_variants, name):
        report = remote_variants.report(name)
        assert report["module"].startswith("transformers_modules.")
        torch.testing.assert_close(report["outputs"], outputs_of(tiny_model(**VARIANTS[name])))
        loaded = AutoModelForCausalLM.from_pretrained(remote_variants.folder(name))
        torch.testing.assert_close(outputs_of(loaded), report["outputs"])
        assert files_of(remote_variants.folder(name)) >= CODE


class TestWithMHMoE:
    @pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["plain", "trusting"])
    @pytest.mark.parametrize("auto_class", HEADS)
    def test_gives_the_package_s_classes(self, saved, auto_class, trust):
        auto, model_class = HEADS[auto_class]
        model = auto.from_pretrained(saved[auto_class], **trust)
        assert type(model) is model_class
        assert type(model.config) is mhmoe.MHMoEConfig
        torch.testing.assert_close(outputs_of(model), outputs_of(make(auto_class)))

    def test_config(self, saved):
        assert type(AutoConfig.from_pretrained(saved["AutoConfig"])) is mhmoe.MHMoEConfig
        assert type(AutoModel.from_config(tiny_config())) is mhmoe.MHMoEModel

    @pytest.mark.parametrize("name", ["AutoModelForCausalLM", "sharded", "hub"])
    def test_loads_what_was_saved_without_it(self, remote, name):
        model = AutoModelForCausalLM.from_pretrained(remote.folder(name))
        assert type(model) is mhmoe.MHMoEForCausalLM
        torch.testing.assert_close(outputs_of(model), outputs_of(make("AutoModelForCausalLM")))

    def test_tokenizer_beside_the_model(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded("MH-MoE").input_ids == tokenizer("MH-MoE").input_ids
        assert loaded.chat_template == tokenizer.chat_template
