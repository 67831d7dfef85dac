"""The kinds of model whose routing can be read."""

# MH-MoE, and the plain sparse MoE whose routers also have that name and return logits, weights, chosen experts
MODEL_TYPES = ("mhmoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
