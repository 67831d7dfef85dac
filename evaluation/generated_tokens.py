"""Which tokens of a batched generation count."""

from collections.abc import Callable

import torch
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from transformers import LogitsProcessor


class GeneratedTokenCounter(LogitsProcessor):
    """
    Watches `generate` and says after each forward which of the tokens that it was fed count: those that the row would
    have been fed alone. In a batch a row goes on after its own end until all rows have ended.

    `generate` calls its logits processors once after every forward, with all tokens up to the last one fed, so the
    last token of a text, which is never fed back, is never seen here. The scores pass unchanged.

    Args:
        count: called with the mask (B, T) of the forward's tokens that count; T is 1 after the prompt's forward.
        prompt_mask: (B, T), 0 at the padding of the prompts.
        stop_criteria: lm-eval's criterion of each stop sequence, made for these B rows and not used elsewhere.
        eos_token_ids: tokens at which `generate` ends a row.
    """

    def __init__(
        self,
        count: Callable[[torch.Tensor], None],
        prompt_mask: torch.Tensor,
        stop_criteria: list[MultiTokenEOSCriteria],
        eos_token_ids: list[int],
    ):
        self._count = count
        self._prompt_mask = prompt_mask.bool().cpu()
        self._stop_criteria = stop_criteria
        self._eos_token_ids = torch.tensor(eos_token_ids, dtype=torch.long)
        self._ended = torch.zeros(len(prompt_mask), dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        num_rows, prompt_length = self._prompt_mask.shape
        beams = len(input_ids) // num_rows
        if input_ids.shape[1] == prompt_length:
            mask = self._prompt_mask.repeat_interleave(beams, dim=0)
            mask[torch.arange(len(mask)) % beams != 0] = False  # the beams of a search share one prompt
            self._count(mask)
        elif beams == 1:  # what several beams try belongs to no text
            self._ended |= torch.isin(input_ids[:, -1].cpu(), self._eos_token_ids)
            for criterion in self._stop_criteria:
                criterion(input_ids, scores)
                self._ended |= torch.tensor(criterion.done_tracker)
            self._count(~self._ended[:, None])
        return scores
