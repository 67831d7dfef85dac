import pytest
import reference
import torch
from tiny import tiny_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mhmoe.modeling_mhmoe.load_balancing import by_head, load_balancing_loss, z_loss


BATCH, TOKENS, EXPERTS = 3, 5, 6
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
LEFT_PADDED = RIGHT_PADDED.flip(1)


def random_logits(num_moe_heads: int, layers: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = BATCH * TOKENS
    return tuple(2 * torch.randn(rows, EXPERTS, generator=generator) for _ in range(layers * num_moe_heads))


def counted_rows(logits: tuple[torch.Tensor, ...], mask: torch.Tensor):
    """Of the sub-tokens that the mask lets count: the entry of `logits` and its row."""
    for entry, rows in enumerate(logits):
        for row, scores in enumerate(rows.double()):
            if mask[divmod(row, TOKENS)]:
                yield entry, list(scores)


def reference_loss(
    logits: tuple[torch.Tensor, ...],
    k: int,
    mask: torch.Tensor,
    scoring=reference.softmax,
    biases=((0,) * EXPERTS,) * 6,
) -> torch.Tensor:
    """P1 eq. 10 over the sub-tokens of all heads and layers that the mask lets count."""
    routing = []
    for entry, scores in counted_rows(logits, mask):
        ranks = [gate.item() + bias for gate, bias in zip(scoring(scores), biases[entry], strict=True)]
        ranked = sorted(range(EXPERTS), key=ranks.__getitem__, reverse=True)
        routing.append((reference.shares(scores, scoring), ranked[:k]))
    return reference.load_balancing_loss(routing)


@pytest.mark.parametrize("mask", [None, RIGHT_PADDED, LEFT_PADDED], ids=["all", "right", "left"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("num_moe_heads", [1, 2, 3])
def test_value_is_that_of_transformers_and_of_the_paper(num_moe_heads, k, mask):
    logits = random_logits(num_moe_heads)
    loss = load_balancing_loss(logits, k, mask)
    torch.testing.assert_close(loss, load_balancing_loss_func(logits, EXPERTS, k, mask), rtol=1e-6, atol=0)
    counted = torch.ones(BATCH, TOKENS) if mask is None else mask
    expected = reference_loss(logits, k, counted)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_with_private_experts_each_head_is_balanced_by_itself():
    logits = tuple(entry.requires_grad_() for entry in random_logits(3))
    loss = load_balancing_loss(logits, 2, RIGHT_PADDED, groups=3)
    copies = tuple(entry.detach().double().requires_grad_() for entry in logits)
    expected = sum(reference_loss(copies[head::3], 2, RIGHT_PADDED) for head in range(3)) / 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for entry, copy in zip(logits, copies, strict=True):
        torch.testing.assert_close(entry.grad.double(), copy.grad, rtol=1e-5, atol=1e-8)


def test_heads_that_are_each_unbalanced_do_not_even_each_other_out():
    first, second = torch.zeros(8, EXPERTS), torch.zeros(8, EXPERTS)
    first[:, :3], second[:, 3:] = 9, 9  # each head uses one half of its experts
    pooled, by_group = (load_balancing_loss((first, second), 3, groups=groups) for groups in (1, 2))
    torch.testing.assert_close(pooled, torch.tensor(3.0), rtol=1e-2, atol=0)  # a perfect balance
    torch.testing.assert_close(by_group, torch.tensor(6.0), rtol=1e-2, atol=0)


def test_model_with_private_experts_has_the_loss_of_each_head():
    input_ids = torch.randint(3, 128, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    model = tiny_model(private_experts=True, router_bias_update_rate=0.1)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 12))
    outputs = model(input_ids, attention_mask=RIGHT_PADDED, output_router_logits=True)
    biases = torch.linspace(-0.2, 0.2, 12).view(2, 6).tolist()
    heads = (outputs.router_logits[head::2] for head in range(2))
    losses = [
        reference_loss(logits, 2, RIGHT_PADDED, biases=[bias] * 2) for logits, bias in zip(heads, biases, strict=True)
    ]
    torch.testing.assert_close(outputs.aux_loss.double(), sum(losses) / 2, rtol=1e-6, atol=0)


def test_gradient_is_that_of_the_paper():
    logits = tuple(layer.requires_grad_() for layer in random_logits(2))
    copies = tuple(layer.detach().double().requires_grad_() for layer in logits)
    load_balancing_loss(logits, 2, RIGHT_PADDED).backward()
    reference_loss(copies, 2, RIGHT_PADDED).backward()
    for layer, copy in zip(logits, copies, strict=True):
        torch.testing.assert_close(layer.grad.double(), copy.grad, rtol=1e-5, atol=1e-8)
        padding = RIGHT_PADDED.flatten() == 0
        assert not layer.grad[padding].any()
        assert layer.grad[~padding].any(dim=1).all()


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_sigmoid_gates_and_biased_choices(scoring_func):
    logits = tuple(layer.requires_grad_() for layer in random_logits(2))
    copies = tuple(layer.detach().double().requires_grad_() for layer in logits)
    biases = torch.tensor([[0.4, -0.4, 0, 0, 0, 0], [0, 0, 0, 0.2, 0, -0.3]]).repeat_interleave(2, dim=0)
    loss = load_balancing_loss(logits, 2, RIGHT_PADDED, scoring_func=scoring_func, biases=biases)
    unbiased = load_balancing_loss(logits, 2, RIGHT_PADDED, scoring_func=scoring_func)
    expected = reference_loss(copies, 2, RIGHT_PADDED, getattr(reference, scoring_func), biases.tolist())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert (loss - unbiased).abs() > 0.005
    loss.backward()
    expected.backward()
    for layer, copy in zip(logits, copies, strict=True):
        torch.testing.assert_close(layer.grad.double(), copy.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "fields",
    [
        {"router_bias_update_rate": 0.1},
        {"router_bias_update_rate": 0.1, "router_type": "xmoe", "scoring_func": "sigmoid"},
        {"router_type": "xmoe", "num_moe_heads": 1},
    ],
    ids=str,
)
def test_loss_of_a_model_is_of_what_its_routers_chose(fields):
    model = tiny_model(**fields)
    routers = [layer.mlp.gate for layer in model.model.layers]
    chosen = []
    for router in routers:
        if fields.get("router_bias_update_rate"):
            torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
        router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[-1]))
    outputs = model(torch.arange(3, 33).view(3, 10), output_router_logits=True)
    scoring = getattr(reference, fields.get("scoring_func", "softmax"))
    routing = [
        (reference.shares(list(row), scoring), choice.tolist())
        for logits, choices in zip(outputs.router_logits, by_head(chosen, model.config.num_moe_heads), strict=True)
        for row, choice in zip(logits.double(), choices, strict=True)
    ]
    torch.testing.assert_close(outputs.aux_loss.double(), reference.load_balancing_loss(routing), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask", [None, RIGHT_PADDED, LEFT_PADDED], ids=["all", "right", "left"])
@pytest.mark.parametrize("num_moe_heads", [1, 3])
def test_z_loss_is_that_of_its_paper(num_moe_heads, mask):
    logits = tuple(layer.requires_grad_() for layer in random_logits(num_moe_heads))
    copies = tuple(layer.detach().double().requires_grad_() for layer in logits)
    loss = z_loss(logits, mask)
    counted = torch.ones(BATCH, TOKENS) if mask is None else mask
    expected = reference.z_loss([scores for _, scores in counted_rows(copies, counted)])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for layer, copy in zip(logits, copies, strict=True):
        torch.testing.assert_close(layer.grad.double(), copy.grad, rtol=1e-5, atol=1e-8)


def test_z_loss_in_the_training_loss():
    """Scaled, as the load balancing loss is, by a micro-batch's share of the targets; padding does not count."""
    model = tiny_model(router_z_loss_coef=0.5, router_aux_loss_coef=0.25)
    ids = torch.arange(3, 33).view(2, 15)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    plain, outputs = model(**inputs), model(**inputs, output_router_logits=True)
    z = z_loss(outputs.router_logits, mask)
    assert (z - z_loss(outputs.router_logits)).abs() > 1e-3
    torch.testing.assert_close(outputs.loss, plain.loss + 0.25 * outputs.aux_loss + 0.5 * z)
    step = {"num_items_in_batch": torch.tensor(4 * 28)}
    part = model(**inputs, output_router_logits=True, **step).loss
    torch.testing.assert_close(part, model(**inputs, **step).loss + (0.25 * outputs.aux_loss + 0.5 * z) / 4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_perfect_balance_gives_k(k):
    """Each expert is chosen equally often and has the same mean probability."""
    row = torch.arange(EXPERTS, dtype=torch.float32)
    logits = torch.stack([row.roll(shift) for shift in range(EXPERTS)])
    torch.testing.assert_close(load_balancing_loss((logits,), k), torch.tensor(float(k)))


def test_full_imbalance_gives_the_number_of_experts():
    logits = torch.zeros(8, EXPERTS)
    logits[:, 0] = 100.0
    torch.testing.assert_close(load_balancing_loss((logits,), 1), torch.tensor(float(EXPERTS)))


def test_low_precision_logits_are_counted_in_float32():
    logits = tuple(layer.bfloat16() for layer in random_logits(2))
    loss = load_balancing_loss(logits, 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, load_balancing_loss(tuple(layer.float() for layer in logits), 2))


def aux_loss_and_gradients(model, rows: list[list[int]], **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    aux_loss = model(torch.tensor(rows), output_router_logits=True, **inputs).aux_loss
    aux_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return aux_loss.detach(), gradients


@pytest.mark.parametrize("num_moe_heads", [1, 2, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_model(side, num_moe_heads):
    """Two rows of five tokens, alone and with padding (whose ids are real tokens, to leave a trace if they count)."""
    model = tiny_model(num_moe_heads=num_moe_heads, shared_expert_intermediate_size=16)
    rows = [[5, 9, 23, 4, 77], [64, 3, 3, 91, 12]]
    expected_loss, expected_gradients = aux_loss_and_gradients(model, rows)

    padding, ones = [31, 32, 33], [1] * 5
    if side == "right":
        padded, mask = [row + padding for row in rows], torch.tensor([[*ones, 0, 0, 0]] * 2)
        positions = None
    else:
        padded, mask = [padding + row for row in rows], torch.tensor([[0, 0, 0, *ones]] * 2)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    loss, gradients = aux_loss_and_gradients(model, padded, attention_mask=mask, position_ids=positions)
    unmasked_loss, _ = aux_loss_and_gradients(model, padded, position_ids=positions)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert (unmasked_loss - expected_loss).abs() > 1e-3
    assert gradients.keys() == expected_gradients.keys()
    assert "model.layers.0.mlp.gate.weight" in gradients
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_weight_in_the_training_loss(coefficient):
    model = tiny_model(router_aux_loss_coef=coefficient)
    ids = torch.arange(3, 23).view(2, 10)
    plain = model(ids, labels=ids)
    balanced = model(ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    torch.testing.assert_close(balanced.loss, plain.loss + coefficient * balanced.aux_loss)
    torch.testing.assert_close(balanced.aux_loss, load_balancing_loss(balanced.router_logits, 2))


def test_no_moe_layer_no_aux_loss():
    model = tiny_model(mlp_only_layers=[0, 1])
    ids = torch.arange(3, 13)[None]
    outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.aux_loss is None
    torch.testing.assert_close(outputs.loss, model(ids, labels=ids).loss)


def test_weight_is_kept_over_micro_batches():
    """The step's mean of two micro-batches (`num_items_in_batch` is the step's) counts the auxiliary loss once."""
    model = tiny_model(router_aux_loss_coef=0.5).train()
    ids = torch.arange(3, 23).view(2, 10)
    targets = ids[:, 1:].numel()
    halves = [
        model(row[None], labels=row[None], output_router_logits=True, num_items_in_batch=torch.tensor(targets))
        for row in ids
    ]
    plain = model(ids, labels=ids).loss
    mean_aux_loss = (halves[0].aux_loss + halves[1].aux_loss) / 2
    torch.testing.assert_close(halves[0].loss + halves[1].loss, plain + 0.5 * mean_aux_loss)


@pytest.mark.parametrize("num_moe_heads", [1, 2, 4])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_tools_that_compute_the_loss_themselves_find_ours(side, num_moe_heads):
    """What transformers' function makes of a model's router logits and its mask of tokens, gradients too."""
    model = tiny_model(num_moe_heads=num_moe_heads, num_hidden_layers=3, decoder_sparse_step=2, num_experts_per_tok=3)
    ids = torch.arange(3, 33).view(2, 15)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask = {None: None, "right": mask, "left": mask.flip(1)}[side]
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    theirs = load_balancing_loss_func(outputs.router_logits, model.config.num_experts, 3, mask)
    torch.testing.assert_close(theirs, outputs.aux_loss, rtol=1e-6, atol=0)
    router = model.model.layers[1].mlp.gate.weight
    gradients = [torch.autograd.grad(loss, router, retain_graph=True)[0] for loss in (theirs, outputs.aux_loss)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_router_logits_are_those_of_each_head():
    model = tiny_model(num_moe_heads=3, num_hidden_layers=2)
    sub_tokens = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _router, inputs, _output: sub_tokens.append(inputs[0]))
    for return_dict in (True, False):
        outputs = model.model(torch.arange(3, 23).view(2, 10), output_router_logits=True, return_dict=return_dict)
        router_logits = outputs.router_logits if return_dict else outputs[-1]
        for layer in range(2):
            for head in range(3):
                expected = sub_tokens[layer][head::3] @ model.model.layers[layer].mlp.gate.weight.T
                torch.testing.assert_close(router_logits[3 * layer + head], expected)
        sub_tokens.clear()


def test_a_micro_batch_of_padding_alone_has_no_loss():
    """As the last rows of a process may be; the step has other targets, so the cross entropy is 0 too."""
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train()
    ids = torch.arange(3, 23).view(2, 10)
    padding = {"attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    outputs = model(ids, **padding, output_router_logits=True, num_items_in_batch=torch.tensor(18))
    assert outputs.aux_loss == 0
    assert z_loss(outputs.router_logits, padding["attention_mask"]) == 0
    assert outputs.loss == 0
    outputs.loss.backward()
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("offset", [0.0, -80.0, -95.0, -300.0, 40.0])
def test_sigmoids_too_small_or_too_large_to_tell_apart(offset):
    """In float32 below -104 all are 0, and above 17 all are 1."""
    logits = tuple((layer + offset).requires_grad_() for layer in random_logits(2))
    copies = tuple(layer.detach().double().requires_grad_() for layer in logits)
    loss = load_balancing_loss(logits, 2, RIGHT_PADDED, scoring_func="sigmoid")
    expected = reference_loss(copies, 2, RIGHT_PADDED, reference.sigmoid)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    loss.backward()
    expected.backward()
    for layer, copy in zip(logits, copies, strict=True):
        torch.testing.assert_close(layer.grad.double(), copy.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("offset", [-95.0, -300.0, 40.0])
def test_router_whose_sigmoids_are_too_small_or_too_large(offset, norm_topk_prob):
    """Its choice and weights are the reference's, and all gradients are finite."""
    fields = {"router_type": "xmoe", "scoring_func": "sigmoid", "norm_topk_prob": norm_topk_prob}
    router = tiny_model(**fields, num_experts_per_tok=3).model.layers[0].mlp.gate
    given = (random_logits(1)[0] + offset).requires_grad_()
    router.logits = lambda _sub_tokens: given  # cosines over a temperature that has become small
    logits, weights, index = router(torch.zeros(BATCH * TOKENS, 24))
    for row, (scores, chosen) in enumerate(zip(logits.double(), index.tolist(), strict=True)):
        assert chosen == scores.argsort(descending=True)[:3].tolist()
        scores = [scores[expert] for expert in chosen]
        expected = reference.shares(scores, reference.sigmoid) if norm_topk_prob else reference.sigmoid(scores)
        torch.testing.assert_close(weights[row].double(), torch.stack(expected), rtol=1e-4, atol=1e-38)
    weights.square().sum().backward()
    assert given.grad.isfinite().all()
