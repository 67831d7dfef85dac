"""vLLM's entry point into this package: `vllm.general_plugins` in setup.cfg, called in each of its processes."""


def register() -> None:
    """Make MH-MoE known to transformers and to vLLM; the model itself is imported when vLLM asks for it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import mhmoe  # noqa: F401, which registers the config and the models

    from .served import ServedConfig

    ModelRegistry.register_model("MHMoEForCausalLM", "mhmoe.serving.vllm_model:MHMoEForCausalLM")
    MODELS_CONFIG_MAP["MHMoEForCausalLM"] = ServedConfig
