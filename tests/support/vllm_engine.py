"""
`python tests/support/vllm_engine.py JOBS ANSWERS`: what vLLM answers, one engine after another in a process of its
own, since vLLM changes the classes of the models that it loads.
"""

import json
import os
import sys
from pathlib import Path


# settings of vLLM, which it reads when it is imported
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")


def answers(
    folder: str, prompts: list[list[int]], tokens: int, together: bool, engine: dict, pooling_task: str | None
) -> list[dict]:
    """Of each prompt: the greedy tokens, their log-probabilities, and how many of the prompt's tokens were cached."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=0, detokenize=False)
    # a core for each process: more would wait for each other where the machine is busy
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(engine.get("tensor_parallel_size", 1))))
    try:
        llm = LLM(folder, **{**settings, **engine})
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        if pooling_task:
            pooled = llm.encode(requests, pooling_task=pooling_task, use_tqdm=False)
            return [{"pooled": output.outputs.data.tolist()} for output in pooled]
        outputs = []
        for batch in [requests] if together else [[request] for request in requests]:
            outputs += llm.generate(batch, sampling, use_tqdm=False)
        found = []
        for output in outputs:
            [answer] = output.outputs
            steps = zip(answer.token_ids, answer.logprobs, strict=True)
            logprobs = [step[token].logprob for token, step in steps]
            found.append({"tokens": answer.token_ids, "logprobs": logprobs, "cached": output.num_cached_tokens})
        del llm
        return found
    finally:
        cleanup_dist_env_and_memory()


def main(jobs_file: Path, answers_file: Path) -> None:
    found = []
    for job in json.loads(jobs_file.read_text()):
        try:
            found.append({"answers": answers(**job)})
        except Exception as error:  # the tests say which are expected
            found.append({"error": f"{type(error).__name__}: {error}"})
    answers_file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
