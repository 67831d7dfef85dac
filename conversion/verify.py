"""Does a converted checkpoint keep what its strategy promises? Measured on the reloaded folders."""

import os
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mhmoe import MHMoEForCausalLM
from mhmoe.errors import UserError
from mhmoe.files import write_json
from mhmoe.intake import check_file, check_folder, read_json
from mhmoe.loading import load_tokenizer, token_ids_of
from mhmoe.model_cards import sections
from mhmoe.sources import refuse_adapter

from .checkpoint import TOKENIZER_ITSELF, DenseCheckpoint
from .comparing import digest, load_checked, max_difference, read_text
from .convert import REPORT_NAME
from .families import ENCODERS
from .strategies import STRATEGIES
from .verify_encoders import EncoderVerification, verify_encoder


DEFAULT_TEXT = Path(__file__).parent / "verify_text.txt"
WINDOW = 128  # tokens of a row
GENERATED = 32  # tokens of greedy text


@dataclass(frozen=True)
class Verification:
    """
    What was measured. Differences are the largest over all positions and the whole vocabulary, in logits.

    Attributes:
        strategy: of the conversion.
        dtype: in which both models ran.
        tokens: number of tokens compared.
        max_logit_difference: on whole rows.
        max_padded_logit_difference: on a batch with left and one with right padding, at the real tokens.
        same_greedy_text: whether both models continue the text with the same tokens.
        dense_perplexity, mhmoe_perplexity: on the text.
        changed_tensors: names of embeddings, attention tensors, norms and so on that are not the dense model's.
    """

    strategy: str
    dtype: str
    tokens: int
    max_logit_difference: float
    max_padded_logit_difference: float
    same_greedy_text: bool
    dense_perplexity: float
    mhmoe_perplexity: float
    changed_tensors: tuple[str, ...]

    @property
    def broken_promises(self) -> list[str]:
        """What the strategy promises and the figures do not show."""
        broken, promise = [], STRATEGIES[self.strategy].promise
        bound = promise.max_logit_difference
        if bound is not None and (bound == 0 or self.dtype == "float32"):
            # written so that a NaN breaks the promise
            broken += [
                f"max |logit difference| {where} is {value:.3g}, not {bound:g}"
                for where, value in (
                    ("without padding", self.max_logit_difference),
                    ("with padding", self.max_padded_logit_difference),
                )
                if not value <= bound
            ]
            broken += [] if self.same_greedy_text else ["greedy text differs"]
        elif not self.mhmoe_perplexity <= (most := self.dense_perplexity * (promise.max_perplexity_ratio or inf)):
            broken.append(f"perplexity is {self.mhmoe_perplexity:.4f}, not at most {most:.4f}")
        if self.changed_tensors:
            broken.append(f"{self.changed_tensors[0]} is not the dense model's ({len(self.changed_tensors)} in all)")
        return broken

    def table(self) -> str:
        """The figures, for people."""
        rows = [
            (f"perplexity ({self.tokens} tokens)", f"{self.dense_perplexity:.4f}", f"{self.mhmoe_perplexity:.4f}"),
            (
                "tensors besides the FFNs",
                "",
                f"{len(self.changed_tensors)} differ" if self.changed_tensors else "equal",
            ),
            ("max |logit difference|", "", f"{self.max_logit_difference:g}"),
            ("the same, with padding", "", f"{self.max_padded_logit_difference:g}"),
            (f"greedy text ({GENERATED} tokens)", "", "equal" if self.same_greedy_text else "differs"),
        ]
        lines = [f"{self.dtype + ', strategy ' + self.strategy:<30}{'dense':>12}{'MH-MoE':>12}"]
        return "\n".join(lines + [f"{name:<30}{dense:>12}{mhmoe:>12}" for name, dense, mhmoe in rows])


def verify(
    source: str | Path,
    output: str | Path,
    *,
    text: str | Path | None = None,
    dtype: str = "auto",
    max_tokens: int = 1024,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Verification | EncoderVerification:
    """
    Compare a converted checkpoint with its source, one model in memory at a time.

    Args:
        source: folder or Hub id of the dense checkpoint.
        output: folder that `convert` made.
        text: file to compare on; by default some paragraphs that come with the package.
        dtype: in which both models run; "auto" is the one in which `output` is stored.
        max_tokens: how much of the text is used.
        revision: branch, tag or commit of `source` on the Hub.
        trust_remote_code: whether the code of the source's tokenizer may be run.

    Returns:
        The figures; `broken_promises` is empty if they are what the strategy promises.

    Raises:
        UserError: a folder or the text cannot be read.
        VerificationError: `output` lacks tensors, or holds others.
    """
    output = Path(output)
    check_folder(output)
    report = read_json(output / REPORT_NAME, "is it a folder that mhmoe convert made?")
    if (strategy := report.get("strategy")) not in list(STRATEGIES):  # a list compares what cannot be hashed, too
        raise UserError(f"{output / REPORT_NAME}: strategy={strategy!r} is unknown to this version")
    refuse_adapter(output)
    if dtype == "auto":
        dtype = read_json(output / "config.json").get("dtype") or "float32"
    checkpoint = DenseCheckpoint(source, revision, code=trust_remote_code)
    if checkpoint.config.model_type in ENCODERS:
        return verify_encoder(checkpoint, output, strategy, Path(text or DEFAULT_TEXT), dtype, max_tokens)
    rows = _rows_of_tokens(checkpoint, Path(text or DEFAULT_TEXT), max_tokens, trust_remote_code)

    measured = []
    stages = ((AutoModelForCausalLM, checkpoint.folder), (MHMoEForCausalLM, output))
    for model_class, folder in tqdm(stages, desc="Verifying", unit="model"):
        measured.append(_Measured(load_checked(model_class, folder, dtype), rows))
    dense, mhmoe = measured
    return Verification(
        strategy=strategy,
        dtype=dtype,
        tokens=rows.numel(),
        max_logit_difference=max_difference(dense.logits, mhmoe.logits),
        max_padded_logit_difference=max_difference(dense.padded_logits, mhmoe.padded_logits),
        same_greedy_text=torch.equal(dense.generated, mhmoe.generated),
        dense_perplexity=dense.perplexity,
        mhmoe_perplexity=mhmoe.perplexity,
        changed_tensors=tuple(name for name, digest in mhmoe.digests.items() if dense.digests.get(name) != digest),
    )


def keep_figures(verification: Verification | EncoderVerification, output: str | Path) -> None:
    """
    Write the figures into `output`: as "verification" in conversion.json, as a section "Verified" on the card.

    Raises:
        UserError: one of the two files is missing or cannot be written.
    """
    output = Path(output)
    report = {**read_json(output / REPORT_NAME), "verification": asdict(verification)}
    if os.path.lexists(output / "README.md"):
        check_file(output / "README.md", output)
    try:
        section = f"## Verified\n\nBy `mhmoe verify`, against the source:\n\n```\n{verification.table()}\n```"
        sections.replace_in_file(output / "README.md", "verified", section)
        write_json(output / REPORT_NAME, report)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be updated ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{output / 'README.md'}: cannot be updated, for it is not UTF-8") from error


class _Measured:
    """What one model says of `rows`, (B, T) token ids."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, rows: torch.Tensor):
        self.logits = torch.cat([model(row[None]).logits for row in rows])  # (B, T, vocabulary)
        log_probabilities = self.logits[:, :-1].float().log_softmax(-1)
        # of torch, which knows infinity
        self.perplexity = (-log_probabilities.gather(-1, rows[:, 1:, None]).mean()).double().exp().item()
        half = rows[:1, : rows.shape[1] // 2]
        padding = torch.zeros_like(half)
        padded_logits = []
        for side in ("left", "right"):
            parts = (padding, half) if side == "left" else (half, padding)
            batch = torch.cat([rows[:1, : 2 * half.shape[1]], torch.cat(parts, dim=1)])
            mask = torch.ones_like(batch)
            mask[1] = torch.cat([torch.full_like(part, int(part is half)) for part in parts], dim=1)
            logits = model(batch, attention_mask=mask).logits
            padded_logits.append(logits[mask.bool()])
        self.padded_logits = torch.cat(padded_logits)
        greedy = GenerationConfig(do_sample=False, max_new_tokens=GENERATED, pad_token_id=0)
        # ty: ignore[not-callable]: all of these models have it
        generated = model.generate(half, attention_mask=torch.ones_like(half), generation_config=greedy)
        self.generated = getattr(generated, "sequences", generated)  # a dictionary if the model asks for one
        self.digests = {name: digest(tensor) for name, tensor in model.state_dict().items() if ".mlp." not in name}


def _rows_of_tokens(checkpoint: DenseCheckpoint, text: Path, max_tokens: int, trust_remote_code: bool) -> torch.Tensor:
    """Token ids in equal rows, (B, T); random ones, said aloud, for a model without a tokenizer."""
    content = read_text(text, max_tokens)
    if checkpoint.files(TOKENIZER_ITSELF):
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
        ids = token_ids_of(tokenizer, content, return_tensors="pt", truncation=True, max_length=max_tokens)[0]
    else:
        tqdm.write(f"{checkpoint.folder} has no tokenizer: comparing on random tokens")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(checkpoint.config.vocab_size, (max_tokens,), generator=generator)
    longest = checkpoint.config.max_position_embeddings - GENERATED
    if longest < 4:
        raise UserError(
            f"{checkpoint.folder}: max_position_embeddings={longest + GENERATED} is too little for {GENERATED} tokens "
            "of greedy text after a text; there is nothing to compare"
        )
    width = min(WINDOW, len(ids), longest)
    if width < 4:
        raise UserError(f"{text}: only {len(ids)} tokens; give a longer --text")
    return ids[: len(ids) // width * width].view(-1, width)
