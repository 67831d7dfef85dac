import json
import math

import pytest
import torch
from tiny import save_dense, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mhmoe.errors import UserError
from mhmoe.evaluation import RoutingRecorder, analyse_routing, routing_text
from mhmoe.evaluation.routing import MODEL_TYPES
from mhmoe.evaluation.routing_command import main
from mhmoe.evaluation.routing_text import token_rows
from mhmoe.evaluation.token_reach import TokenReach


# by character, the two experts of each of its sub-tokens in layer 0; in layer 2 each is the next one, of six
ROUTES = {"a": [(0, 1), (0, 1)], "b": [(0, 1), (2, 3)], "c": [(0, 1), (1, 2)]}


def model_of_known_routes(num_moe_heads=2):
    """Layer 1 is dense. No layer changes the residual stream, so every layer's router sees the token's embedding."""
    model = tiny_model(num_hidden_layers=3, mlp_only_layers=[1], num_moe_heads=num_moe_heads)
    width = 48 // num_moe_heads
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        for layer in (0, 2):
            block = model.model.layers[layer].mlp
            block.experts.down_proj.zero_()
            block.gate.weight.copy_(torch.eye(6, width).roll(layer // 2, dims=0))
            if num_moe_heads > 1:
                block.head_layer.weight.copy_(torch.eye(48))
        for character, routes in ROUTES.items():
            sub_tokens = torch.zeros(num_moe_heads, width)
            for sub_token, (first, second) in zip(sub_tokens, routes, strict=False):
                sub_token[first], sub_token[second] = 2.0, 1.0
            model.model.embed_tokens.weight[ord(character)] = sub_tokens.flatten()
    return model


def write_documents(file, *documents):
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


@pytest.fixture
def ragged(tmp_path):
    documents = ["Short.", "A somewhat longer document, of two rows.", "x", "", "Some more, <pad>ded or not", "Short."]
    return write_documents(tmp_path / "ragged.jsonl", *documents)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_figures_of_known_routes(tmp_path, batch_size):
    text = write_documents(tmp_path / "text.jsonl", "aaab", "bc")
    settings = {"batch_size": batch_size, "block_size": 3, "min_count": 2}
    routing = analyse_routing(model_of_known_routes(), tiny_tokenizer(), text, **settings)

    assert [layer["layer"] for layer in routing["layers"]] == [0, 2]
    first, second = routing["layers"]
    # of three a, two b, one c
    assert first["counts"] == [9, 10, 3, 2, 0, 0]
    assert second["counts"] == [0, 9, 10, 3, 2, 0]
    assert first["frequency"] == pytest.approx([9 / 6, 10 / 6, 3 / 6, 2 / 6, 0, 0])
    assert first["tokens_by_experts"] == second["tokens_by_experts"] == [0, 0, 3, 1, 2]
    assert first["experts_per_token"] == pytest.approx(17 / 6)
    assert first["share_activated"] == pytest.approx(4 / 6)
    assert first["max_over_mean_load"] == pytest.approx(10 / 24 * 6)
    assert {key: routing[key] for key in ("num_moe_heads", "num_experts", "num_experts_per_tok", "num_tokens")} == {
        "num_moe_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_tokens": 6,
    }
    assert routing["experts_per_token"] == pytest.approx(17 / 6)
    assert routing["share_activated"] == pytest.approx(4 / 6)
    assert routing["num_sub_tokens"] == 12
    entries = [
        {"id": ord("b"), "token": "b", "count": 2, "experts_per_token": 4.0},
        {"id": ord("a"), "token": "a", "count": 3, "experts_per_token": 2.0},
    ]
    assert routing["tokens"] == {"most": entries, "fewest": entries[::-1]}  # c occurs once


def test_threshold_and_lists_of_known_routes(tmp_path):
    text = write_documents(tmp_path / "text.jsonl", "aaab", "bc")
    settings = {"threshold": 0.5, "min_count": 1, "num_extremes": 1}
    routing = analyse_routing(model_of_known_routes(), tiny_tokenizer(), text, **settings)
    assert [layer["share_activated"] for layer in routing["layers"]] == pytest.approx([2 / 6, 2 / 6])
    assert routing["share_activated"] == pytest.approx(2 / 6)
    assert [entry["token"] for kind in ("most", "fewest") for entry in routing["tokens"][kind]] == ["b", "a"]


def test_one_head_is_a_plain_sparse_moe(tmp_path):
    text = write_documents(tmp_path / "text.jsonl", "aaab", "bc")
    routing = analyse_routing(model_of_known_routes(num_moe_heads=1), tiny_tokenizer(), text)
    assert routing["layers"][0]["counts"] == [6, 6, 0, 0, 0, 0]
    assert routing["layers"][0]["tokens_by_experts"] == [0, 0, 6]
    assert (routing["num_moe_heads"], routing["num_tokens"], routing["experts_per_token"]) == (1, 6, 2.0)


@pytest.mark.parametrize("model_type", ["mhmoe", *MODEL_TYPES[1:3]])
def test_figures_do_not_depend_on_batches_or_order(ragged, tmp_path, model_type):
    model = tiny_model(num_moe_heads=3) if model_type == "mhmoe" else plain_moe(model_type)
    settings = {"block_size": 16, "min_count": 2}
    alone = analyse_routing(model, tiny_tokenizer(), ragged, batch_size=1, **settings)
    assert alone["num_tokens"] == 6 + 40 + 1 + 22 + 6  # <pad> is one token, and counts like any other
    assert analyse_routing(model, tiny_tokenizer(), ragged, batch_size=3, **settings) == alone
    assert analyse_routing(model, tiny_tokenizer(), ragged, batch_size=16, **settings) == alone
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(ragged.read_text().splitlines(keepends=True)[::-1]))
    assert analyse_routing(model, tiny_tokenizer(), turned, batch_size=2, **settings) == alone
    assert sum(layer["tokens_by_experts"][-1] for layer in alone["layers"]) > 0


def test_figures_are_those_of_the_recorder(ragged):
    model, tokenizer = tiny_model(num_hidden_layers=3, decoder_sparse_step=2), tiny_tokenizer()
    recorder = RoutingRecorder(model)
    counts = recorder.new_counts()
    with recorder:
        for row in token_rows(ragged, tokenizer, 16, 1000):
            model(torch.tensor([row]))
            counts.add(recorder.chosen)
    routing = analyse_routing(model, tokenizer, ragged, block_size=16)
    expected = counts.summary()
    assert {key: routing[key] for key in expected if key != "layers"} == {
        key: value for key, value in expected.items() if key != "layers"
    }
    assert [layer["counts"] for layer in routing["layers"]] == [layer["counts"] for layer in expected["layers"]]
    # the vocabulary's means, weighted by occurrence, are the text's mean
    listed = analyse_routing(model, tokenizer, ragged, block_size=16, min_count=1, num_extremes=200)["tokens"]["most"]
    assert sum(entry["count"] for entry in listed) == routing["num_tokens"]
    total = sum(entry["count"] * entry["experts_per_token"] for entry in listed)
    assert total / routing["num_tokens"] == pytest.approx(routing["experts_per_token"])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_is_used_up_to_max_tokens(ragged):
    model = tiny_model()
    for max_tokens in (1, 7, 22, 23):
        routing = analyse_routing(model, tiny_tokenizer(), ragged, max_tokens=max_tokens, block_size=16)
        assert routing["num_tokens"] == max_tokens


def test_extremes_of_known_means():
    reach = TokenReach(6)
    reach.occurrences = torch.tensor([5, 3, 2, 9, 0, 5])
    reach.reached = torch.tensor([10, 9, 8, 18, 0, 15])  # means 2, 3, 4, 2, -, 3
    assert reach.experts_per_token.tolist() == [2.0, 3.0, 4.0, 2.0, 0.0, 3.0]
    assert reach.extremes(2, min_count=1) == ([2, 5], [3, 0])
    assert reach.extremes(9, min_count=3) == ([5, 1, 3, 0], [3, 0, 5, 1])
    assert reach.extremes(9, min_count=0)[1] == [3, 0, 5, 1, 2]  # never what did not occur
    assert reach.extremes(9, min_count=10) == ([], [])


def test_rows_hold_every_token_once(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    text = "Some words\nand lines of\ndifferent length, and onelongwordwithoutaspace in it.\n  " * 3
    (tmp_path / "text.txt").write_text(text)
    for piece in (1, 7, 40, 1000):
        monkeypatch.setattr(routing_text, "PIECE", piece)
        rows = list(token_rows(tmp_path / "text.txt", tokenizer, 10, 10_000))
        assert {len(row) for row in rows[:-1]} == {10}
        assert "".join(tokenizer.decode(row) for row in rows) == text


def test_pieces_end_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_text, "PIECE", 8)
    tokenized = []

    class Tokenizer:
        def __call__(self, text, add_special_tokens, verbose):
            tokenized.append((text, add_special_tokens))
            return tiny_tokenizer()(text)

    write_documents(tmp_path / "text.jsonl", "one two three four\nfive", "abcdefghijkl mn")
    list(token_rows(tmp_path / "text.jsonl", Tokenizer(), 100, 100))
    assert tokenized == [
        ("one two", True),
        (" three", False),
        (" four\n", False),
        ("five", False),
        ("abcdefgh", True),
        ("ijkl", False),
        (" mn", False),
    ]


def test_a_long_text_is_not_read_beyond_need(tmp_path):
    lengths = []

    class Tokenizer:
        def __call__(self, text, **_):
            lengths.append(len(text))
            return tiny_tokenizer()(text)

    (tmp_path / "long.txt").write_text("word " * 400_000)
    rows = list(token_rows(tmp_path / "long.txt", Tokenizer(), 64, 100))
    assert [len(row) for row in rows] == [64, 36]
    assert sum(lengths) <= routing_text.PIECE
    file = write_documents(tmp_path / "broken later.jsonl", "a" * 50)
    file.write_text(file.read_text() + "{broken\n")
    assert [len(row) for row in token_rows(file, tiny_tokenizer(), 64, 50)] == [50]


def test_what_the_tokenizer_puts_first_stands_once_in_each_document(tmp_path, monkeypatch):
    monkeypatch.setattr(routing_text, "PIECE", 8)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write_documents(tmp_path / "text.jsonl", "a document in pieces", "b")
    rows = list(token_rows(tmp_path / "text.jsonl", tokenizer, 100, 100))
    assert [[place for place, token in enumerate(row) if token == 1] for row in rows] == [[0], [0]]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_compressed_texts_are_read(tmp_path, name, ending):
    plain, text = tmp_path / "plain", "Ünïcode, two\nlines"
    plain.write_text(text if name == "text.txt" else json.dumps({"text": text, "id": 1}) + "\n\n", encoding="utf-8")
    file = tmp_path / (name + ending)
    if ending:
        import pyarrow

        with pyarrow.output_stream(str(file), compression="detect") as stream:
            stream.write(plain.read_bytes())
    else:
        plain.rename(file)
    (row,) = token_rows(file, tiny_tokenizer(), 100, 100)
    assert row == tiny_tokenizer()(text).input_ids


def plain_moe(model_type="mixtral", **overrides):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    inner = {"intermediate_size": 32, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    experts = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.1}
    fields = {"max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **inner, **experts, **fields, **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    return {
        "known": save(model_of_known_routes(), parent / "known"),
        "mixtral": save(plain_moe(), parent / "mixtral"),
        "dense": str(save_dense(parent / "dense")),
        "dense layers": save(tiny_model(mlp_only_layers=[0, 1]), parent / "dense-layers"),
    }


@pytest.fixture
def text(tmp_path):
    return write_documents(tmp_path / "text.jsonl", "aaab" * 5, "bc" * 5)


def test_command_shows_models_side_by_side(folders, text, tmp_path, capsys):
    output = tmp_path / "deep" / "output"
    command = [folders["known"], folders["mixtral"], "--text", str(text), "--output_path", str(output)]
    main([*command, "--min_count", "6", "--batch_size", "3", "--block_size", "7"])
    overview, by_layer, known, mixtral, files = capsys.readouterr().out.split("\n\n")

    assert [line.split("|")[1].strip() for line in overview.splitlines()[2:]] == ["known", "mixtral"]
    cells = [cell.strip() for cell in overview.splitlines()[2].split("|")[2:-1]]
    entropy = -sum(load * math.log(load) for load in (9 / 24, 10 / 24, 3 / 24, 2 / 24)) / math.log(6)
    assert cells == ["2", "6", "2", "2", "66.67%", "2.83", "2.50", f"{entropy:.4f}", "30"]
    headings, *layers = [[cell.strip() for cell in line.split("|")[1:-1]] for line in by_layer.splitlines()]
    activated, *others = ("experts activated", "experts per token", "max / mean load", "entropy")
    assert headings[1:6] == [f"known: {activated}", *others, f"mixtral: {activated}"]
    assert [row[0] for row in layers[1:]] == ["0", "1", "2"]
    assert layers[1][1:5] == ["66.67%", "2.83", "2.50", f"{entropy:.4f}"]
    assert layers[2][1:5] == [""] * 4  # dense in the first model
    assert layers[2][6] == "2.00"
    assert layers[3][5:] == [""] * 4  # the second has two layers
    assert [cell.strip() for cell in known.splitlines()[2].split("|")[1:-1]] == [
        "`b`",
        "4.00",
        "10",
        "`a`",
        "2.00",
        "15",
    ]
    assert "mixtral: most" in mixtral
    assert files.splitlines() == [str(output / "routing.json"), str(output / "routing.png")]

    assert sorted(file.name for file in output.iterdir()) == ["routing.json", "routing.png"]
    assert (output / "routing.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "routing.json").read_text())
    models = report.pop("models")
    assert report == {"text": str(text), "max_tokens": 20_000, "min_count": 6}
    assert [model["model"] for model in models] == [folders["known"], folders["mixtral"]]
    settings = {"block_size": 7, "min_count": 6, "batch_size": 1}
    assert models[0] == {
        "model": folders["known"],
        "block_size": 7,
        **analyse_routing(model_of_known_routes(), tiny_tokenizer(), text, **settings),
    }
    assert models[1]["layers"] == analyse_routing(plain_moe(), tiny_tokenizer(), text, **settings)["layers"]

    before = (output / "routing.json").read_bytes()
    with pytest.raises(UserError, match=r"routing.json: exists already; give another --output_path, or --overwrite"):
        main(command)
    assert (output / "routing.json").read_bytes() == before
    assert "experts activated (at least once)" in overview
    main([*command, "--overwrite", "--threshold", "1"])
    assert json.loads((output / "routing.json").read_text())["models"][1]["threshold"] == 1.0
    assert "experts activated (> 1 times a token)" in capsys.readouterr().out


def test_private_experts_have_a_figure_and_names(text, tmp_path, capsys):
    model = save(tiny_model(private_experts=True, mlp_only_layers=[]), tmp_path / "private")
    main([model, "--text", str(text), "--output_path", str(tmp_path / "out"), "--min_count", "1"])
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())["models"][0]
    assert routing["experts"][-1] == "head 1, expert 5"
    assert len(routing["layers"][0]["counts"]) == routing["num_experts"] == 12
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_command_chooses_rows_that_the_model_can_take(folders, tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 300)
    command = [folders["mixtral"], "--text", str(tmp_path / "text.txt"), "--output_path", str(tmp_path / "output")]
    main([*command, "--max_tokens", "100", "--dtype", "bfloat16", "--device", "cpu"])
    (model,) = json.loads((tmp_path / "output" / "routing.json").read_text())["models"]
    assert (model["block_size"], model["num_tokens"]) == (64, 100)


def test_models_of_one_folder_name_are_told_apart(folders, text, tmp_path, capsys):
    other = save(model_of_known_routes(1), tmp_path / "known")
    main([folders["known"], other, "--text", str(text)])
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:4]]
    assert names == [folders["known"], other]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("routing")] == []


def test_nothing_half_written_is_left(folders, text, tmp_path, monkeypatch):
    def fail(_models, file):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("mhmoe.evaluation.routing_command.save_routing_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        main([folders["known"], "--text", str(text), "--output_path", str(tmp_path / "output")])
    assert list((tmp_path / "output").iterdir()) == []


def test_python_refuses_what_has_no_routers(text):
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="LlamaForCausalLM: has no MoE layers"):
        analyse_routing(LlamaForCausalLM(config), tiny_tokenizer(), text)
    with pytest.raises(UserError, match=r"tokenizer gives token 99, but vocab_size=99"):
        analyse_routing(tiny_model(vocab_size=99), tiny_tokenizer(), text)


def test_a_torch_for_an_accelerator_that_is_not_there(folders, text, monkeypatch, capsys):
    """As the usual wheel of torch is on a computer without a GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    main([folders["known"], "--text", str(text), "--max_tokens", "20"])
    assert "known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dense}"], "model_type='llama' has no routers that can be read here; give a model of mhmoe, mixtral"),
        (["{dense layers}"], "has no MoE layers"),
        (["{missing}"], "no such folder"),
        (["{text}"], "a file, not a model folder"),
        (["{known}", "{known}"], "name each model once"),
        (["{known}", "{dense}"], "model_type='llama'"),
        ([], "required: MODEL"),
        (["{known}", "--max_tokens", "0"], "--max_tokens 0: give at least 1"),
        (["{known}", "--batch_size", "-1"], "--batch_size -1: give at least 1"),
        (["{known}", "--block_size", "0"], "--block_size 0: give at least 1"),
        (["{known}", "--block_size", "257"], "at most max_position_embeddings=256 tokens"),
        (["{known}", "--threshold", "nan"], "--threshold nan: give 0 or more"),
        (["{known}", "--threshold", "-1"], "--threshold -1.0: give 0 or more"),
        (["{known}", "--device", "nonsense"], "--device nonsense: cannot be used"),
        (["{known}", "--device", "meta"], "--device meta: cannot be used"),
        (["{known}", "--output-path", "/proc/x"], "--output_path /proc/x: /proc is not a folder that can be written"),
        (["{known}", "--output_path", "x" * 300], "--output_path x*: File name too long"),
        (["{known}", "--text", "{deep JSON}"], "cannot be read as .jsonl"),
        (["{known}", "--output_path", "{text}"], "not a folder that can be written to"),
        (["{known}", "--text", "{missing}.txt"], "missing.txt: no such file"),
        (["{known}", "--text", "{known}/config.json"], "cannot tell what it holds from its name"),
        (["{known}", "--text", "{empty}"], "there is no text in it"),
        (["{known}", "--text", "{no archive}"], "cannot be read as .txt"),
        (["{known}", "--text", "{no JSON}"], "cannot be read as .jsonl"),
        (["{known}", "--text", "{no UTF-8}"], "cannot be read as .txt"),
        (["{known}", "--text", "{no field}"], 'line 2 has no field "text" that holds a text'),
        (["{no router}"], "its weights lack model.layers.0.mlp.gate.weight"),
        (["{no tokenizer}"], "cannot be loaded"),
        (["{bad config}"], r"config\.json: cannot be read as JSON"),
    ],
)
def test_mistakes_get_one_line(folders, text, tmp_path, arguments, message):
    files = {
        "empty": ("empty.txt", b""),
        "no archive": ("broken.txt.gz", b"\x1f\x8b nothing"),
        "no JSON": ("broken.jsonl", b"{broken\n"),
        "deep JSON": ("deep.jsonl", b"[" * 100_000),
        "no UTF-8": ("broken.txt", b"\xff\xfe\xff"),
        "no field": ("other.jsonl", b'{"text": "a"}\n{"content": "b"}\n'),
    }

    def place(name):
        if name in files:
            file, content = files[name]
            (tmp_path / file).write_bytes(content)
            return str(tmp_path / file)
        if name == "no router":
            model = model_of_known_routes()
            state = {key: value for key, value in model.state_dict().items() if "layers.0.mlp.gate" not in key}
            model.save_pretrained(tmp_path / "broken", state_dict=state)
            tiny_tokenizer().save_pretrained(tmp_path / "broken")
            return str(tmp_path / "broken")
        if name == "no tokenizer":
            model_of_known_routes().save_pretrained(tmp_path / "broken")
            return str(tmp_path / "broken")
        if name == "bad config":
            (tmp_path / "broken").mkdir()
            (tmp_path / "broken" / "config.json").write_text("{")
            return str(tmp_path / "broken")
        return {**folders, "text": str(text), "missing": str(tmp_path / "missing")}[name]

    filled = [
        argument if "{" not in argument else place(argument[1 : argument.index("}")]) + argument.partition("}")[2]
        for argument in arguments
    ]
    with pytest.raises(UserError, match=message) as error:
        main([*(["--text", str(text)] if "--text" not in filled else []), *filled])
    assert "\n" not in str(error.value)
