"""The kinds of model whose routing can be read."""

# MH-MoE, and plain sparse MoEs, all tested: their experts are a module called with rows, chosen experts, weights
MODEL_TYPES = ("mhmoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
