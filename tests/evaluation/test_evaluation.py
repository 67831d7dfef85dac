import importlib.util
import json
import os
import re
from pathlib import Path

import lm_eval
import lm_eval.tasks
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from tiny import save_dense, tiny_model, tiny_tokenizer

from mhmoe.errors import UserError
from mhmoe.evaluation import TASKS_FOLDER, RoutingRecorder, evaluate_model
from mhmoe.evaluation.card import add_results
from mhmoe.evaluation.eval_command import main
from mhmoe.evaluation.lm_eval_model import MHMoELM
from mhmoe.evaluation.lm_eval_run import find_tasks


MAX_LENGTH = 64
# what the tiny model happens to say to some of the prompts below: it stops at these, it ends at that, or goes on
STOPS = ["E/", "3"]
END = ord("{")
TASKS = {
    # "<pad>" is a token like any other here, with the id that lm-eval pads with
    "choices": [
        {"text": "Which is it? ", "choices": ["a", "b", "cc", "dd<pad>x"], "answer": 1},
        {
            "text": "A longer question, to make the batches ragged: ",
            "choices": ["q<pad><pad>z", "w", "ee"],
            "answer": 0,
        },
        {"text": "Q<pad>", "choices": ["<pad>a", "<pad>b"], "answer": 1},
        {"text": "Which is it? ", "choices": ["a", "b", "cc", "dd<pad>x"], "answer": 2},
    ],
    "documents": [
        {"text": "Short."},
        {"text": "Short."},
        {"text": "It ends with padding<pad><pad>."},
        {"text": "A document of several windows. " * 7},
    ],
    "answers": [
        {"text": text} for text in ("Say it", "Now say something else:", "x", "Say it", "e!", "12345678", "Zz")
    ],
}
DEFINITIONS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
    },
    "documents": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module", autouse=True)
def no_survey():
    """lm-eval surveys the machine for every results file, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("models") / "tiny-mhmoe")  # for the files beside the weights
    model = tiny_model(max_position_embeddings=MAX_LENGTH, num_experts=12, eos_token_id=END)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("models") / "tiny-dense")


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory) -> Path:
    """Tasks of each kind of request; `twins` asks for the same as `choices`, and `pair` is the group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, kind in {**{name: name for name in TASKS}, "twins": "choices"}.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in TASKS[kind]))
        definition = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            **DEFINITIONS[kind],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    (folder / "pair.yaml").write_text(yaml.safe_dump({"group": "pair", "task": ["choices", "twins"]}))
    return folder


@pytest.fixture(scope="module")
def evaluate(model_folder, tasks_folder):
    def evaluate(*tasks, **options):
        manager = TaskManager(include_path=tasks_folder, include_defaults=False)
        options = {"bootstrap_iters": 0, "device": "cpu", **options}
        return evaluate_model(options.pop("model", model_folder), tasks, task_manager=manager, **options)

    return evaluate


@pytest.fixture(scope="module")
def results(evaluate):
    return evaluate("choices", "documents", "answers", "twins", batch_size=8)


@pytest.fixture
def quick_command(monkeypatch):
    """The command without lm-eval's thousands of tasks, which take seconds to index, and without its log handler."""
    monkeypatch.setattr("mhmoe.evaluation.eval_command.setup_logging", lambda: None)
    own = lm_eval.tasks.manager.TaskManager
    without_defaults = lambda **kwargs: own(**{**kwargs, "include_defaults": False})  # noqa: E731
    monkeypatch.setattr(lm_eval.tasks.manager, "TaskManager", without_defaults)


def answers(results, task):
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_routing_is_the_same_at_every_batch_size(evaluate, results, batch_size):
    other = evaluate("choices", "documents", "answers", "twins", batch_size=batch_size, max_batch_size=5)
    assert other["routing"] == results["routing"]
    assert list(other["routing"]) == ["answers", "choices", "documents", "twins"]
    assert answers(other, "answers") == answers(results, "answers")


@pytest.mark.parametrize("task", [*TASKS, "twins"])
def test_a_task_is_counted_alike_alone_and_among_others(evaluate, results, task):
    assert evaluate(task, batch_size=8)["routing"][task] == results["routing"][task]


def test_shared_forwards_do_not_show(evaluate, results):
    without_cache = evaluate("choices", batch_size=8, model_args={"logits_cache": False})
    assert without_cache["routing"]["choices"] == results["routing"]["choices"] == results["routing"]["twins"]


def inputs_by_hand(task, model, tokenizer):
    """The tokens that enter the model for every request of a task, each request by itself."""
    if task == "choices":
        for row in TASKS[task]:
            for choice in row["choices"]:
                text = row["text"].rstrip() + " " * row["text"].endswith(" ") + choice
                yield tokenizer.encode(text)[:-1]
    elif task == "documents":
        for row in TASKS[task]:
            tokens = tokenizer.encode(row["text"])
            yield [tokenizer.bos_token_id, *tokens[: min(MAX_LENGTH, len(tokens)) - 1]]
            for end in range(MAX_LENGTH, len(tokens), MAX_LENGTH):
                end = min(end + MAX_LENGTH, len(tokens))
                yield tokens[max(end - MAX_LENGTH - 1, 0) : end - 1]
    else:
        for row in TASKS[task]:
            tokens = tokenizer.encode(row["text"])
            length = len(tokens)
            criteria = stop_sequences_criteria(tokenizer, [*STOPS, tokenizer.eos_token], length, 1)
            while len(tokens) < length + 12:
                tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
                if tokens[-1] == END or any(stop(torch.tensor([tokens]), None) for stop in criteria):
                    break
            yield tokens[:-1]  # the last one is not fed back


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_routing_equals_a_recount_of_every_request_by_itself(results, task):
    model = tiny_model(max_position_embeddings=MAX_LENGTH, num_experts=12)
    recorder = RoutingRecorder(model)
    counts = recorder.new_counts()
    inputs = list(inputs_by_hand(task, model, tiny_tokenizer()))
    with recorder:
        for tokens in inputs:
            model(torch.tensor([tokens]))
            counts.add(recorder.chosen)
    assert results["routing"][task] == counts.summary()
    # what would make the comparison weaker than it looks
    assert len({len(tokens) for tokens in inputs}) > 2
    if task == "answers":
        generated = [len(tokens) + 1 - len(row["text"]) for tokens, row in zip(inputs, TASKS[task], strict=True)]
        assert len(set(generated)) > 3
        assert max(generated) == 12
    else:
        assert any(tokens[-1] == 0 for tokens in inputs)


def test_answers_are_those_of_lm_eval_itself(results, model_folder, tasks_folder):
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "trust_remote_code": True},
        tasks=list(results["results"]),
        task_manager=TaskManager(include_path=tasks_folder, include_defaults=False),
        batch_size=8,
        bootstrap_iters=0,
        device="cpu",
    )
    assert theirs["results"] == results["results"]
    for task in theirs["samples"]:
        assert answers(theirs, task) == answers(results, task)


def test_a_group_has_the_routing_of_its_tasks(evaluate, results):
    routing = evaluate("pair", batch_size=8)["routing"]
    assert routing["choices"] == results["routing"]["choices"]
    assert routing["pair"]["num_sub_tokens"] == 2 * routing["choices"]["num_sub_tokens"]
    assert routing["pair"]["layers"][0]["load"] == routing["choices"]["layers"][0]["load"]


def test_a_dense_model_has_accuracies_only(evaluate, dense_folder):
    results = evaluate("choices", "documents", "answers", model=dense_folder, batch_size=4)
    assert "routing" not in results
    assert set(results["results"]) == {"choices", "documents", "answers"}


def test_a_model_in_memory_keeps_no_hooks(evaluate, results):
    model = tiny_model(max_position_embeddings=MAX_LENGTH, num_experts=12)
    own = evaluate("choices", model=model, model_args={"tokenizer": tiny_tokenizer()}, batch_size=2)
    assert own["routing"]["choices"] == results["routing"]["choices"]
    assert json.dumps(own["config"]["model_args"])
    assert not any(module._forward_hooks for module in model.modules())


def test_processes_count_together(model_folder):
    from lm_eval.api.instance import Instance

    from mhmoe.evaluation.lm_eval_model import MHMoELM

    def requests():
        return [
            Instance("generate_until", {}, ("Say it", {"until": ["e"], "max_gen_toks": 4}), 0, ("answers", 0, 1)),
            Instance("generate_until", {}, ("Now", {"until": ["e"], "max_gen_toks": 4}), 0, ("answers", 1, 1)),
        ]

    def run(requests):
        lm = MHMoELM(pretrained=str(model_folder), device="cpu", batch_size=4)
        lm.generate_until(requests, disable_tqdm=True)
        return lm

    whole = run(requests())
    first, second = (run([request, request]) for request in requests())  # lm-eval fills up with copies
    first.gather_object = lambda obj, dst=0: [obj, dict(second.routing)]
    second.gather_object = lambda obj, dst=0: None
    assert first.gather_routing()["answers"].summary() == whole.routing["answers"].summary()
    assert second.gather_routing() == {}


@pytest.mark.parametrize("where", [None, "folder", "with others"])
def test_the_smoke_task_works_from_anywhere(model_folder, tasks_folder, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    include_path = {None: None, "folder": TASKS_FOLDER, "with others": [tasks_folder]}[where]
    tasks = ["mhmoe_smoke", "choices"] if where == "with others" else ["mhmoe_smoke"]
    results = evaluate_model(model_folder, tasks, include_path=include_path, batch_size=8, limit=5)
    assert set(results["results"]) == set(tasks)
    assert {"acc,none", "acc_norm,none"} <= results["results"]["mhmoe_smoke"].keys()
    assert results["n-samples"]["mhmoe_smoke"] == {"original": 40, "effective": 5}


def test_the_smoke_task_is_sound():
    rows = [json.loads(line) for line in (TASKS_FOLDER / "mhmoe_smoke.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == 40
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["answer"] == position for row in rows) for position in range(4)] == [10] * 4
    gold_is_longest = [max(row["choices"], key=len) == row["choices"][row["answer"]] for row in rows]
    assert sum(gold_is_longest) < 20  # length does not give it away


@pytest.mark.usefixtures("quick_command")
def test_command_writes_results_with_routing_and_heatmaps(model_folder, tasks_folder, tmp_path, capsys):
    command = [str(model_folder), "--tasks", "choices,answers", "mhmoe_smoke", "--include_path", str(tasks_folder)]
    command += ["--limit", "3", "--batch_size", "4", "--output_path", str(tmp_path), "--log_samples"]
    main([*command, "--apply_chat_template"])
    printed = capsys.readouterr().out
    main([*command, "--model_args", "dtype=bfloat16,max_length=60"])

    result_files = sorted(tmp_path.rglob("results_*.json"))
    assert len(result_files) == 2  # nothing is overwritten
    results, others = map(json.loads, (file.read_text() for file in result_files))
    assert others["config"]["model_args"] == {"pretrained": str(model_folder), "dtype": "bfloat16", "max_length": 60}
    assert (results["model_source"], results["config"]["model"]) == ("mhmoe", "mhmoe")
    assert set(results["routing"]) == set(results["results"]) == {"choices", "answers", "mhmoe_smoke"}
    layers = results["routing"]["choices"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert [sum(layer["load"]) for layer in layers] == pytest.approx([1.0, 1.0])
    assert len(layers[0]["load"]) == 12
    # the chat template adds "user: "
    assert results["routing"]["choices"]["num_sub_tokens"] > others["routing"]["choices"]["num_sub_tokens"]

    date = result_files[0].stem.removeprefix("results_")
    folder = result_files[0].parent
    for task in results["routing"]:
        assert (folder / f"routing_{task}_{date}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"samples_{task}_{date}.jsonl").is_file()
    assert re.search(r"\|mhmoe_smoke\|\s*\d+\|none", printed)  # lm-eval's table
    assert re.search(r"\|mhmoe_smoke\s*\|\s*\d+\.\d+%\|\s*[1-4]\.\d\d\|", printed)  # the routing
    assert printed.endswith(f"{result_files[0]}\n")


@pytest.mark.usefixtures("quick_command")
def test_command_takes_a_results_file_a_config_file_and_a_dense_model(dense_folder, tasks_folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    fields = {"tasks": "choices", "include_path": str(tasks_folder), "model_args": "dtype=float32", "batch_size": 2}
    config.write_text(yaml.safe_dump(fields))
    main([str(dense_folder), "--config", str(config), "--output_path", str(tmp_path / "out" / "mine.json")])
    (file,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"mine_.*\.json", file.name)
    results = json.loads(file.read_text())
    assert "routing" not in results
    assert results["config"]["model_args"] == {"pretrained": str(dense_folder), "dtype": "float32"}
    assert "Routing" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick_command")
def test_command_without_output_path_writes_nothing(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(model_folder), "--tasks", "mhmoe_smoke", "--limit", "2"])
    assert "experts activated" in capsys.readouterr().out
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("quick_command")
def test_command_updates_the_card(model_folder, tmp_path):
    card = model_folder / "README.md"
    before = card.read_text()
    try:
        main([str(model_folder), "--tasks", "mhmoe_smoke", "--limit", "2", "--update_card"])
        main([str(model_folder), "--tasks", "mhmoe_smoke", "--limit", "2", "--batch_size", "4", "--update_card"])
        data = ModelCard.load(card).data
        assert [(e.dataset_name, e.metric_type) for e in data.eval_results] == [
            ("mhmoe_smoke", "acc"),
            ("mhmoe_smoke", "acc_norm"),
        ]
        assert data.eval_results[0].metric_name == "mhmoe_smoke acc (0-shot, 2 of 40 rows)"
        assert data.license == "apache-2.0"
        assert card.read_text().endswith(before.split("---")[-1])
        assert {path.name for path in model_folder.iterdir() if path.name.startswith(".")} == set()
    finally:
        card.write_text(before)


def test_card_keeps_other_results_and_tells_tasks_of_one_data_set_apart(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")

    def results(**values):
        return {
            "configs": {
                task: {
                    "dataset_path": "truthfulqa/truthful_qa",
                    "dataset_name": "multiple_choice",
                    "test_split": "test",
                }
                for task in values
            },
            "results": {
                task: {"alias": task, "acc,none": value, "acc_stderr,none": 0.1, "name": task, "sample_len": 9}
                for task, value in values.items()
            },
            "n-samples": {task: {"original": 9, "effective": 9} for task in values},
            "n-shot": dict.fromkeys(values, 0),
        }

    add_results(tmp_path, results(mc1=0.25, mc2=0.5))
    add_results(tmp_path, results(mc2=0.75))
    entries = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {entry.metric_name: entry.metric_value for entry in entries} == {
        "mc1 acc (0-shot)": 0.25,
        "mc2 acc (0-shot)": 0.75,
    }
    assert entries[0].dataset_type == "truthfulqa/truthful_qa"


def broken(folder: Path, name: str, content: str) -> str:
    folder = save_dense(folder / "broken")
    (folder / name).write_text(content)
    return str(folder)


@pytest.mark.usefixtures("quick_command")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--tasks", "nosuch"], "Tasks not found: nosuch; see mhmoe eval --help"),
        (
            ["{model}", "--tasks", "mhmoe_smoke", "--no-such-flag"],
            "unrecognized arguments: --no-such-flag; see mhmoe eval",
        ),
        (["{model}"], "--tasks: name at least one task"),
        (["--tasks", "mhmoe_smoke"], "the following arguments are required: MODEL"),
        (["{empty}/missing", "--tasks", "mhmoe_smoke"], "missing: no such folder"),
        (["{empty}", "--tasks", "mhmoe_smoke"], "no config.json in this folder"),
        (["{model}/config.json", "--tasks", "mhmoe_smoke"], "a file, not a model folder"),
        (["{bad config}", "--tasks", "mhmoe_smoke"], r"broken/config\.json: cannot be read as JSON"),
        (["{bad weights}", "--tasks", "mhmoe_smoke"], "broken: cannot be loaded"),
        (["{model}", "--tasks", "mhmoe_smoke", "--batch_size", "x"], "--batch_size x: give a number of rows"),
        (["{model}", "--tasks", "mhmoe_smoke", "--batch_size", "0"], "--batch_size 0: give a number of rows"),
        (["{model}", "--tasks", "mhmoe_smoke", "--include_path", "{empty}/missing"], "missing: not a readable folder"),
        (
            ["{model}", "--tasks", "mhmoe_smoke", "--output_path", "{model}/config.json/x"],
            "cannot be written|can be written",
        ),
        (["{model}", "--tasks", "mhmoe_smoke", "--log_samples"], "Specify --output_path"),
        (["{model}", "--tasks", "mhmoe_smoke", "--model", "hf"], "--model hf: leave it out"),
        (["{model}", "--tasks", "mhmoe_smoke", "--model_args", "pretrained=other"], "pretrained=other: leave it out"),
        (["{model}", "--tasks", "mhmoe_smoke", "--model_args", "no_such=1"], "cannot be loaded .*no_such"),
        (["{model}", "--tasks", "mhmoe_smoke", "--config", "{empty}/missing.yaml"], "--config .*missing.yaml"),
        (["{model}", "--tasks", "mhmoe_smoke", "--limit", "x"], "argument --limit/-L: invalid float value"),
        (["{no card}", "--tasks", "mhmoe_smoke", "--update_card"], "README.md: no model card to update"),
        (["{no template}", "--tasks", "mhmoe_smoke", "--apply_chat_template"], "has no chat template"),
        (["{model}", "--tasks", "mhmoe_smoke", "--include_path", "{fifo}"], "task.yaml: is a device, pipe or socket"),
        (["{model}", "--tasks", "{fifo}"], "task.yaml: is a device, pipe or socket"),
        (["{model}", "--tasks", "{yaml}/broken.yaml"], "broken.yaml.*; see mhmoe eval --help"),
        (
            ["{model}", "--tasks", "lost", "--include_path", "{lost}"],
            "the rows of a task cannot be read .*nowhere.jsonl",
        ),
    ],
)
def test_mistakes_get_one_line(model_folder, tmp_path, arguments, message):
    def place(name):
        if name == "model":
            return str(model_folder)
        if name == "bad config":
            return broken(tmp_path, "config.json", "{")
        if name == "bad weights":
            return broken(tmp_path, "model.safetensors", "nothing")
        folder = tmp_path / name.replace(" ", "-")
        if name == "empty":
            folder.mkdir()
        elif name == "yaml":
            folder.mkdir()
            (folder / "broken.yaml").write_text("task: [")
        elif name == "fifo":
            folder.mkdir()
            os.mkfifo(folder / "task.yaml")
        elif name == "lost":
            folder.mkdir()
            fields = {"task": "lost", "dataset_path": "json", "dataset_kwargs": {"data_files": "nowhere.jsonl"}}
            (folder / "lost.yaml").write_text(yaml.safe_dump(fields))
        else:
            save_dense(folder)
            (folder / "README.md").unlink()
            (folder / "chat_template.jinja").unlink()
        return str(folder)

    with pytest.raises(UserError, match=message) as error:
        main([re.sub(r"\{(.+?)\}", lambda match: place(match[1]), argument) for argument in arguments])
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("quick_command")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "-1"], "--limit -1.0: give more than 0"),
        (["--limit", "nan"], "--limit nan: give more than 0"),
        (["--num-fewshot", "-1"], "--num_fewshot -1: give at least 0"),
        (["--max-batch-size", "0", "--batch-size", "auto"], "--max_batch_size 0: give at least 1"),
        (["--device", "nosuch"], "--device nosuch: cannot be used"),
        (["--device", "meta"], "--device meta: cannot be used"),
        (["--verbosity", "loud"], "--verbosity LOUD: give one of CRITICAL"),
        (["--samples", "missing.json"], "--samples missing.json: give JSON, or a file"),
        (["--samples", '{"mhmoe_smoke": "x"}'], "--samples .*: give JSON, or a file"),
        (["--samples", '{"others": [1]}'], "samples: 'others' is none of the tasks mhmoe_smoke"),
        (["--samples", '{"mhmoe_smoke": [99]}'], "tasks mhmoe_smoke: cannot be set up .*k=40"),
        (["--model_args", "max_length=-3"], "--model_args max_length=-3.0: give a number of tokens"),
        (["--model_args", "max_length=1", "--limit", "1"], "max_length=1: a task asks for [0-9]+ tokens at once"),
        (["--model_args", "parallelize=True"], "parallelize: there is no accelerator"),
        (["--hf_hub_log_args", "nosuch=1"], "--hf_hub_log_args: .*nosuch"),
        (["--use_cache", "{folder}/file/x"], "--use_cache .*file is not a folder"),
        (["--output_path", "x" * 300], "--output_path x*: File name too long"),
        (["--output_path", "/proc/x"], "--output_path /proc/x: /proc is not a folder that can be written to"),
        (["--config", "{folder}/fields.yaml"], "fields.yaml: limit='x': give a value of type float or null or int"),
        (["--config", "{folder}/deep.yaml"], "deep.yaml: maximum recursion depth"),
        (["--config", "{folder}/unknown.yaml"], "unknown.yaml: nosuch=1: lm-eval has no such field"),
    ],
)
def test_mistakes_in_flags_get_one_line(model_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "fields.yaml").write_text("limit: x\n")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    (tmp_path / "unknown.yaml").write_text("nosuch: 1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        main(
            [
                str(model_folder),
                "--tasks=mhmoe_smoke",
                *(argument.replace("{folder}", str(tmp_path)) for argument in arguments),
            ]
        )
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("quick_command")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric_list": [{"metric": "acc", "aggregation": "nosuch"}]}, "task mine: .* aggregation of its metric acc"),
        ({"nosuch": 1}, "tasks mine: cannot be set up .*nosuch"),
        ({"test_split": "nosuch"}, "tasks mine: cannot be set up .*KeyError: 'nosuch'"),
        ({"doc_to_text": "{{question"}, "tasks mine: cannot be set up .*TemplateSyntaxError"),
        ({"doc_to_text": "{{nosuch.x}}"}, "tasks mine: cannot be set up .*'nosuch' is undefined"),
        ({"output_type": "nosuch"}, "tasks mine: cannot be set up .*invalid output_type"),
        ({"group": "mine", "task": ["mine"]}, "group 'mine' is a part of itself"),
        (
            DEFINITIONS["answers"] | {"generation_kwargs": {"until": ["."], "max_gen_toks": 99}},
            r"max tokens to generate \(99\) must be less than model's maximum sequence length",
        ),
        (
            DEFINITIONS["answers"] | {"generation_kwargs": {"until": ["."], "max_gen_toks": 9, "nosuch": 3}},
            "gen_kwargs: .*nosuch.*; see the task's generation_kwargs too",
        ),
    ],
)
def test_mistakes_in_a_task_get_one_line(model_folder, tasks_folder, tmp_path, fields, message):
    kind = "answers" if "generation_kwargs" in fields else "choices"
    definition = yaml.safe_load((tasks_folder / f"{kind}.yaml").read_text())
    definition = fields if "group" in fields else definition | {"task": "mine"} | fields
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(definition))
    with pytest.raises(UserError, match=message) as error:
        main([str(model_folder), "--tasks", "mine", "--include_path", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_tasks_are_found_by_names_patterns_files_and_folders(tasks_folder, tmp_path):
    manager = TaskManager(include_path=tasks_folder, include_defaults=False)
    file, folder = tmp_path / "own.yaml", tmp_path / "mine"
    folder.mkdir()
    for place, name in ((file, "own"), (folder / "other.yaml", "other")):
        place.write_text(yaml.safe_dump({"task": name}))
    assert find_tasks(["choices", "doc*", "choices"], manager) == ["choices", "documents"]
    assert find_tasks([str(file), str(folder)], manager) == [str(file), str(folder / "other.yaml")]
    assert find_tasks([str(tmp_path / "*.yaml")], manager) == [str(file)]
    file.write_text("output_type: multiple_choice\n")
    with pytest.raises(UserError, match=r"own\.yaml: .*; see mhmoe eval --help"):
        find_tasks([str(file)], manager)


@pytest.mark.usefixtures("quick_command")
def test_an_error_of_the_model_keeps_its_traceback(model_folder, monkeypatch):
    def broken(*_, **__):
        raise KeyError("not the user's mistake")

    monkeypatch.setattr(MHMoELM, "_model_call", broken)
    with pytest.raises(KeyError, match="not the user's mistake"):
        main([str(model_folder), "--tasks", "mhmoe_smoke", "--limit", "1"])


def test_unknown_tasks_are_named_in_python_too(evaluate):
    with pytest.raises(UserError, match="task 'nosuch' is not known"):
        evaluate("choices", "nosuch")


@pytest.mark.usefixtures("quick_command")
def test_official_tasks_on_real_rows(shared_data, model_folder, tmp_path):
    script = shared_data.parent / "tools" / "offline_tasks.py"
    if not script.is_file():
        pytest.skip(f"no {script}")
    spec = importlib.util.spec_from_file_location("offline_tasks", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(script), str(tmp_path)])
        module.main()
    model = tiny_model(num_experts=12, max_position_embeddings=2048)
    arguments = {"model_args": {"tokenizer": tiny_tokenizer()}, "include_path": tmp_path, "limit": 4}
    alone, batched = (
        evaluate_model(model, ["arc_easy", "piqa"], batch_size=batch_size, **arguments) for batch_size in (1, 8)
    )
    assert alone["routing"] == batched["routing"]
    assert set(alone["routing"]) == {"arc_easy", "piqa"}
    assert alone["results"]["arc_easy"]["acc,none"] == batched["results"]["arc_easy"]["acc,none"]
