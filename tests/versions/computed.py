"""What a model computes, to compare versions by."""

import torch


def computed(model: torch.nn.Module) -> dict:
    """Logits, loss, the norm of every gradient, and greedy text, where the model has them."""
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    results = {"logits": model(ids, attention_mask=mask).logits.detach()}
    if model.can_generate():
        outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        if outputs.loss.requires_grad:
            outputs.loss.backward()
            norms = {name: weight.grad.norm() for name, weight in model.named_parameters() if weight.grad is not None}
            results |= {"loss": outputs.loss.detach(), "aux_loss": outputs.aux_loss.detach(), "gradients": norms}
        for cache in ("dynamic", "static"):
            settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
            # a static cache would be compiled, which takes longer than all else here
            results[cache] = model.generate(ids, attention_mask=mask, disable_compile=True, **settings)
    return results
