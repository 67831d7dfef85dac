"""What vLLM is not to serve, found before it builds or loads anything."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig


if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


class ServedConfig(VerifyAndUpdateConfig):
    """
    The checks that vLLM makes in the process of the user: of a model, and of all options together.

    Raises:
        NotImplementedError: in one line, what of config.json or of vLLM's options stands in the way.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        _refuse(model_config, _of_the_model(model_config))

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        _refuse(vllm_config.model_config, _of_the_options(vllm_config))


def _refuse(model_config: "ModelConfig", reasons: Iterable[str]) -> None:
    if reasons := list(reasons):  # not with a ValueError, of which pydantic would make several lines
        raise NotImplementedError(f"{model_config.model} is not served: {'; '.join(reasons)}")


def _of_the_model(model_config: "ModelConfig") -> Iterator[str]:
    config = model_config.hf_config
    if config.use_bitnet:
        yield (
            f"use_bitnet=True with bitnet_packed={config.bitnet_packed} rounds what vLLM's linear layers do not; use "
            "`mhmoe serve`"
        )
    if config.experts_quantization or getattr(config, "quantization_config", None):
        yield (
            f"quantization_config is set, with experts_quantization={config.experts_quantization!r}; save the model "
            "dequantised (model.dequantize()), or use `mhmoe serve`"
        )
    elif model_config.quantization:
        yield f"--quantization {model_config.quantization} was never tried with experts of sub-tokens; leave it out"
    rope = config.rope_parameters or {}
    length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope.get("rope_type") in ("dynamic", "longrope") and model_config.max_model_len > length:
        yield (
            f"rope_type={rope['rope_type']!r} rotates all sequences of a batch as the longest one needs; with "
            f"--max-model-len {length} all need the same"
        )


def _of_the_options(vllm_config: "VllmConfig") -> Iterator[str]:
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if vllm_config.lora_config:
        yield "--enable-lora does not know experts of sub-tokens; merge the adapter (merge_and_unload in PEFT)"
    if parallel.enable_expert_parallel or parallel.data_parallel_size > 1:
        yield (
            f"--enable-expert-parallel and --data-parallel-size {parallel.data_parallel_size} count tokens where an "
            "expert has sub-tokens; use --tensor-parallel-size, or start several servers"
        )
    for field in ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"):
        if (size := getattr(config, field)) % parallel.tensor_parallel_size:
            yield f"--tensor-parallel-size {parallel.tensor_parallel_size} does not divide {field}={size}"
