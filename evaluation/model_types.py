"""The kinds of model whose routing can be read."""

# MH-MoE, and the plain sparse MoEs of transformers whose experts are one module in each layer; all are tested
MODEL_TYPES = ("mhmoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
