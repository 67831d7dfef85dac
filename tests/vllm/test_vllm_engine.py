"""What vLLM's engine does around the model: batches, caches, chunks, processes; and what is not served."""

import json

import pytest
import torch


pytest.importorskip("vllm.version")  # tests/vllm alone would pass for vllm

from tiny import tiny_config, tiny_model
from transformers import AutoTokenizer
from vllm_jobs import Job, assert_same, run_jobs, some_prompts, transformers_answers

from mhmoe import MHMoEForTokenClassification


SIZES = {"hidden_size": 96, "head_dim": 32, "shared_expert_intermediate_size": 16, "max_position_embeddings": 256}
SUBJECTS = (
    *("the sea", "a bicycle", "the moon", "bread", "winter", "a library", "the violin", "rice", "a volcano", "chess"),
    *("the desert", "glass", "honey", "a bridge", "the owl", "salt", "a train", "silk", "the tide", "an atlas"),
)
# longer than a block of the cache, so that the second prompt finds it there
BEGINNING = (
    "You are a patient teacher who answers in a few plain sentences, with one example that everybody knows, and who "
    "never says more than was asked. The question today is short, so the answer should be short as well. "
)
CACHED = {"enable_prefix_caching": True, "block_size": 32}
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "max_num_seqs": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**SIZES).save_pretrained(folder)
    return str(folder)


class TestSmolLM2:
    @pytest.fixture(scope="class")
    def prompts(self, smollm2) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        return [tokenizer(f"{BEGINNING}Tell me about {subject}.")["input_ids"] for subject in SUBJECTS]

    @pytest.fixture(scope="class")
    def expected(self, smollm2, prompts) -> list[dict]:
        return transformers_answers(smollm2, prompts)

    @pytest.fixture(scope="class")
    def results(self, smollm2, prompts) -> dict[str, dict]:
        jobs = {
            "together, in chunks": Job(str(smollm2), prompts, engine={**CACHED, **CHUNKED}),
            "one by one": Job(str(smollm2), prompts, together=False, engine=CACHED),
        }
        return dict(zip(jobs, run_jobs([*jobs.values()]), strict=True))

    @pytest.mark.parametrize("name", ["together, in chunks", "one by one"])
    def test_greedy_text_is_that_of_transformers(self, results, expected, name):
        assert len(expected) == 20
        assert_same(results[name], expected)

    def test_beginnings_came_from_the_cache(self, results):
        assert all(answer["cached"] >= 32 for answer in results["one by one"]["answers"][1:])


def test_chunks_caches_and_processes_change_nothing(folder, tmp_path):
    long = [[*range(3, 120), row] for row in range(3, 7)]
    two_matrices = str(tmp_path / "two-matrices")
    tiny_model(gated_mlp=False, **SIZES).save_pretrained(two_matrices)
    jobs = {
        "caches": Job(folder, long, engine=CACHED, together=False),
        "chunks": Job(folder, long, engine=CHUNKED),
        "compiled": Job(folder, long, engine={"enforce_eager": False}),
        "two matrices, compiled": Job(two_matrices, long, engine={"enforce_eager": False}),
        "two processes": Job(folder, long, engine={"tensor_parallel_size": 2}),
        "two matrices, two processes": Job(two_matrices, long, engine={"tensor_parallel_size": 2}),
    }
    results = dict(zip(jobs, run_jobs([*jobs.values()]), strict=True))
    for name, job in jobs.items():
        assert_same(results[name], transformers_answers(job.folder, long))
    assert [answer["cached"] for answer in results["caches"]["answers"]] == [0, 96, 96, 96]


REFUSED = {  # fields of config.json, arguments of vLLM, and what the refusal names
    "BitNet": ({"use_bitnet": True}, {}, "use_bitnet=True"),
    "packed": ({"use_bitnet": True, "bitnet_packed": True}, {}, "bitnet_packed=True"),
    "quantized experts": ({"experts_quantization": "nf4"}, {}, "experts_quantization='nf4'"),
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "quantization_config"),
    "quantized by vLLM": ({}, {"quantization": "fp8"}, "--quantization fp8"),
    "dynamic rotation": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64},
        {"max_model_len": 128},
        "--max-model-len 64",
    ),
    "adapters": ({}, {"enable_lora": True}, "--enable-lora"),
    "expert parallelism": (
        {},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        "--enable-expert-parallel",
    ),
    "odd experts": ({"moe_intermediate_size": 15}, {"tensor_parallel_size": 2}, "moe_intermediate_size=15"),
    "vLLM's own backend": ({}, {"model_impl": "transformers"}, "--model-impl left out"),
}


def test_what_cannot_be_served_is_refused_by_name(folder, tmp_path):
    jobs = []
    for name, (fields, engine, _) in REFUSED.items():
        changed = tmp_path / name
        tiny_config(**SIZES).save_pretrained(changed)
        config = json.loads((changed / "config.json").read_text())
        config |= {"architectures": ["MHMoEForCausalLM"], **fields}
        (changed / "config.json").write_text(json.dumps(config))
        jobs.append(Job(str(changed), some_prompts(1), engine=engine))
    for (name, (_, _, named)), result in zip(REFUSED.items(), run_jobs(jobs), strict=True):
        assert named in result.get("error", ""), f"{name}: {result}"
        assert "\n" not in result["error"], name


def test_a_head_that_classifies_tokens(tmp_path):
    torch.manual_seed(0)
    model = MHMoEForTokenClassification(tiny_config(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    prompts = some_prompts(2)
    [result] = run_jobs([Job(str(tmp_path), prompts, pooling_task="token_classify")])
    for answer, prompt in zip(result["answers"], prompts, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(answer["pooled"]), expected, atol=1e-5, rtol=0)
