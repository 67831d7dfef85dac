"""lm-eval's `hf` model with statistics of the routing, registered with lm-eval as `mhmoe`."""

import logging
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from transformers import LogitsProcessorList

from mhmoe.errors import UserError, one_line

from .generated_tokens import GeneratedTokenCounter
from .routing import MODEL_TYPES, ExpertCounts, RoutingRecorder


logger = logging.getLogger(__name__)


@register_model("mhmoe")
class MHMoELM(HFLM):
    """
    lm-eval's [`HFLM`], whose answers it gives unchanged, in the same batches; in passing it counts which experts the
    sub-tokens of every task reach. A model without MoE layers is evaluated like with `hf`, and nothing is counted.

    Every request counts as if it ran alone: padding, batches, the forwards that lm-eval saves where requests share
    their tokens, the copies with which it evens out processes and the search for a batch size leave no trace.
    Answers that come from lm-eval's cache were not routed and do not count.

    Attributes:
        was_asked: whether there was a request yet.
        routing: [`ExpertCounts`] by name of task, of this process's share of the requests.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.world_size == 1 and hasattr(self, "accelerator"):
            # HFLM shares the requests out among GPUs only: each process on CPUs would answer all of them
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.was_asked = False
        self._recorder = RoutingRecorder(self.model, MODEL_TYPES)
        self.routing: dict[str, ExpertCounts] = defaultdict(self._recorder.new_counts)
        # by hash of the tokens that enter the model, the tasks that ask for them and how often; HFLM works on tokens
        self._asked: dict[int, Counter] = {}
        self._tasks: list[str | None] = []  # of the requests or prompts at hand
        self._inputs = torch.empty(0)  # (B, T), the last batch
        self._lengths: list[int | None] = []  # of its rows, as far as HFLM has read them

    def _get_backend(self, config, backend="default", trust_remote_code=False):
        # HFLM knows only the library's own model types, and warns of others
        if backend == "default" and config.model_type == "mhmoe":
            backend = "causal"
        super()._get_backend(config, backend=backend, trust_remote_code=trust_remote_code)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that are counted; none in a model without MoE layers."""
        return self._recorder.layers

    def gather_routing(self) -> dict[str, ExpertCounts]:
        """`routing` of all processes together, on the first one. All processes must call it."""
        merged = {}
        for routing in self.gather_object(dict(self.routing)) or []:
            for task, counts in routing.items():
                merged[task] = merged[task] + counts if task in merged else counts
        return merged

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._tasks = _tasks(requests)
        with self._recording():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._recording():
            # HFLM forgets whose window is whose, so ask for the windows here
            for request, task in zip(requests, _tasks(requests), strict=True):
                if task is None or not self.moe_layers:
                    continue
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for context, continuation in map(make_disjoint_window, windows):
                    self._ask(task, context + continuation)
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        labelled = [
            replace(request, arguments=(_Prompt(request.args[0], task), *request.args[1:]))
            for request, task in zip(requests, _tasks(requests), strict=True)
        ]
        with self._recording():
            return super().generate_until(labelled, disable_tqdm=disable_tqdm)

    @contextmanager
    def _recording(self) -> Generator[None]:
        self.was_asked = True
        try:
            with self._recorder:
                yield
        except AssertionError as error:  # so HFLM says that lengths do not fit, in a sentence
            if not str(error):
                raise
            raise UserError(one_line(error)) from error
        if self._asked:
            logger.warning("the routing of %d inputs was not seen; the statistics lack them", len(self._asked))
        self._asked, self._tasks = {}, []

    def _ask(self, task: str, tokens: list[int]) -> None:
        # HFLM drops the last token, which is only predicted, and what is too long on the left
        self._asked.setdefault(hash(tuple(tokens[-(self.max_length + 1) : -1])), Counter())[task] += 1

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"max_length={self.max_length}: a task asks for {longest} tokens at once; give as many")
        # a rolling call sets no tasks: its windows are asked for already
        if self.moe_layers and self._tasks:
            for task, (_, context, continuation) in zip(self._tasks, requests, strict=True):
                if task is not None:
                    self._ask(task, context + continuation)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps, *args, **kwargs):
        self._inputs, self._lengths = inps, []
        return super()._model_call(inps, *args, **kwargs)

    def _select_cont_toks(self, logits, contlen=None, inplen=None):
        # the one place where HFLM says how long a row is; it comes by once per row
        if self.moe_layers:
            assert inplen is not None  # of decoders, which alone are here
            virtual = len(logits) - self._inputs.shape[1]  # tokens that PEFT's prompt tuning puts before a row
            self._lengths.append(inplen - virtual)
            if len(self._lengths) == len(self._inputs):
                self._count_batch()
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _count_batch(self) -> None:
        rows = zip(self._inputs.tolist(), self._lengths, strict=True)
        askers = [self._asked.pop(hash(tuple(row[:length])), Counter()) for row, length in rows]
        positions = torch.arange(self._inputs.shape[1])
        self._count(positions < torch.tensor(self._lengths)[:, None], askers)

    def tok_batch_encode(self, strings, *args, **kwargs):
        self._tasks = [getattr(string, "task", None) for string in strings]
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        if not self.moe_layers:
            with _generation_mistakes():
                return super()._model_generate(context, max_length, stop, **generation_kwargs)
        askers = [Counter() if task is None else Counter([task]) for task in self._tasks]
        eos = generation_kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        counter = GeneratedTokenCounter(
            count=lambda mask: self._count(mask, askers),
            prompt_mask=generation_kwargs["attention_mask"],
            # ty: ignore[invalid-argument-type]: any tokenizer
            stop_criteria=stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0]),
            eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        )
        with _generation_mistakes():
            return super()._model_generate(
                context, max_length, stop, logits_processor=LogitsProcessorList([counter]), **generation_kwargs
            )

    def _count(self, mask: torch.Tensor, askers: list[Counter]) -> None:
        """
        Count the last forward. `mask` (B, T) marks the tokens; `askers` has each row's tasks, and how often. What the
        forward had before these tokens, PEFT's virtual ones, does not count.
        """
        chosen = self._recorder.chosen
        for task in dict.fromkeys(task for asker in askers for task in asker):
            times = torch.tensor([asker[task] for asker in askers]).repeat_interleave(len(mask) // len(askers))
            counts, weights = self.routing[task], mask * times[:, None]
            fed = len(chosen[0]) // counts.num_heads // len(mask)
            counts.add(chosen, nn.functional.pad(weights, (fed - weights.shape[1], 0)))


@contextmanager
def _generation_mistakes() -> Generator[None]:
    """`generate` raises these for arguments that it does not know or that contradict each other."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"gen_kwargs: {one_line(error)}; see the task's generation_kwargs too") from error


class _Prompt(str):
    """A prompt that knows its task, which HFLM does not hand on."""

    task: str | None

    def __new__(cls, text: str, task: str | None):
        prompt = super().__new__(cls, text)
        prompt.task = task
        return prompt


def _tasks(requests: list[Instance]) -> list[str | None]:
    """The task of each request, None for the copies that lm-eval appends to give all processes equally many."""
    seen = Counter()
    tasks = []
    for request in requests:
        seen[id(request)] += 1
        tasks.append(request.task_name if seen[id(request)] <= (request.repeats or 1) else None)
    return tasks
