"""A mixture of experts is what its formulas say, however its tokens are sorted and multiplied."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minimind_train.model import moe
from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.model.moe import Mixture, imbalance
from minimind_train.model.transformer import KVCache, MiniMind, initialize
from tests.helpers.models import count_parameters
from tests.helpers.runs import SMALL_MODEL

SMALL = dataclasses.replace(
    SMALL_MODEL, use_moe=True, num_experts=5, num_experts_per_tok=2, router_aux_loss_coef=0.3
)

KINDS = [
    {},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 5},
    {"norm_topk_prob": False},
    {"scoring_func": "sigmoid"},
    {"n_shared_experts": 2, "moe_intermediate_size": 16},
]


needs_grouped = pytest.mark.skipif(
    not hasattr(functional, "grouped_mm"), reason="this torch has no grouped_mm"
)


def mixture_of(config, spread=10.0):
    mixture = Mixture(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.02 * spread, generator=generator)
    return mixture


def inputs(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_by_token(mixture, x):
    """The same from its formulas: one token, and one expert of it, after the other."""
    config = mixture.config
    rows = []
    for token in x.flatten(0, 1):
        logits = mixture.gate.weight @ token
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.exp() / logits.exp().sum()
        chosen = sorted(range(config.num_experts), key=lambda number: -scores[number].item())
        chosen = chosen[: config.num_experts_per_tok]
        total = sum(scores[number] for number in chosen) if config.norm_topk_prob else 1
        row = sum(scores[number] / total * mixture.experts[number](token) for number in chosen)
        for expert in mixture.shared_experts:
            row = row + expert(token)
        rows.append(row)
    return torch.stack(rows).view_as(x)


def values_and_gradients(function, mixture, x, direction):
    mixture = copy.deepcopy(mixture)
    x = x.clone().requires_grad_()
    out = function(mixture, x)
    (out.float() * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in mixture.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


def batched(mixture, x):
    return mixture(x)[0]


@pytest.mark.parametrize(
    "grouped", [False, pytest.param(True, marks=needs_grouped)], ids=["slices", "grouped"]
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_equals_a_loop_over_tokens(kind, grouped, monkeypatch):
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: grouped)
    mixture = mixture_of(dataclasses.replace(SMALL, **kind))
    x, direction = inputs(3, 7, 24), inputs(3, 7, 24, seed=5)
    expected = values_and_gradients(token_by_token, mixture, x, direction)
    found = values_and_gradients(batched, mixture, x, direction)
    for name, tensor in expected.items():
        if tensor is None:  # an expert that no token was sent to, in the loop
            assert not found[name].any(), name
        else:
            assert tensor.abs().max() > 0 or name == "gate.weight"
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@needs_grouped
def test_the_grouped_way_is_the_other_one_under_autocast(monkeypatch):
    mixture = mixture_of(dataclasses.replace(SMALL, n_shared_experts=1))
    x, direction = inputs(4, 16, 24), inputs(4, 16, 24, seed=5)
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_, grouped=grouped: grouped)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(values_and_gradients(batched, mixture, x, direction))
    assert found[0]["out"].dtype == torch.bfloat16
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0.05, atol=0.02, msg=name)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    mixture = mixture_of(dataclasses.replace(SMALL, num_experts_per_tok=1))
    x = inputs(1, 1, 24)
    mixture(x)[0].sum().backward()
    gradients = [expert.up_proj.weight.grad for expert in mixture.experts]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) == 1


class _Leaving(torch.autograd.Function):
    """A grouped multiplication whose weights of groups without tokens are given what the memory held before for a gradient."""

    @staticmethod
    def forward(ctx, tokens, weights, ends):
        ctx.save_for_backward(tokens, weights, ends)
        return functional.grouped_mm(tokens, weights, offs=ends)

    @staticmethod
    def backward(ctx, gradient):
        *inputs, ends = ctx.saved_tensors
        inputs = [each.detach().requires_grad_() for each in inputs]
        with torch.enable_grad():
            out = functional.grouped_mm(*inputs, offs=ends)
        of_tokens, of_weights = torch.autograd.grad(out, inputs, gradient)
        of_weights[ends.diff(prepend=ends.new_zeros(1)) == 0] = float("nan")
        return of_tokens, of_weights, None


def test_what_a_kernel_leaves_in_the_gradient_of_an_expert_without_tokens_is_not_taken(monkeypatch):
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: True)
    mixture = mixture_of(dataclasses.replace(SMALL, num_experts_per_tok=1))
    x, direction = inputs(1, 2, 24), inputs(1, 2, 24, seed=5)
    expected = values_and_gradients(batched, mixture, x, direction)
    monkeypatch.setattr(
        moe,
        "functional",
        SimpleNamespace(
            linear=functional.linear,
            silu=functional.silu,
            grouped_mm=lambda tokens, weights, *, offs: _Leaving.apply(tokens, weights, offs),
        ),
    )
    found = values_and_gradients(batched, mixture, x, direction)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_router_is_exact_under_autocast():
    mixture = mixture_of(SMALL)
    x = inputs(2, 50, 24)
    exact = mixture._route(x)
    with torch.autocast("cpu", torch.bfloat16):
        under = mixture._route(x)
    assert all(torch.equal(one, other) for one, other in zip(exact, under, strict=True))


# Balance


def published_per_window(scores, chosen):
    """DeepSeek-V2's formula, window by window and expert by expert."""
    (num_windows, num_tokens, num_experts), num_each = scores.shape, chosen.shape[2]
    total = 0.0
    for window in range(num_windows):
        for expert in range(num_experts):
            count = (chosen[window] == expert).sum().item()
            share = num_experts / (num_each * num_tokens) * count
            total += share * scores[window, :, expert].mean().item() / num_windows
    return total


def published_by_minimind(scores, chosen):
    """The load of each expert times its mean score over all tokens of the micro-batch, times the experts."""
    scores, chosen = scores.flatten(0, 1), chosen.flatten(0, 1)
    load = functional.one_hot(chosen, scores.shape[1]).double().mean(0)
    return ((load * scores.double().mean(0)).sum() * scores.shape[1]).item()


def test_the_imbalance_is_the_published_one():
    scores = inputs(3, 8, 5).softmax(-1)
    chosen = scores.topk(2, dim=-1).indices
    per_window = imbalance(scores, chosen, per_window=True).item()
    whole = imbalance(scores, chosen, per_window=False).item()
    assert per_window == pytest.approx(published_per_window(scores, chosen), rel=1e-5)
    assert whole == pytest.approx(published_by_minimind(scores, chosen), rel=1e-5)
    assert per_window != pytest.approx(whole / 2, rel=1e-3)


def test_even_use_is_one_and_any_other_is_more():
    even = torch.arange(20).view(1, 20, 1) % 5
    flat = torch.full((1, 20, 5), 0.2)
    assert imbalance(flat, even, per_window=True).item() == pytest.approx(1)
    pulled = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]).expand(1, 20, 5)
    assert imbalance(pulled, torch.zeros_like(even), per_window=True).item() == pytest.approx(3)


@pytest.mark.parametrize("kind", [{}, {"scoring_func": "sigmoid"}], ids=str)
def test_cutting_a_batch_changes_no_balance_per_window(kind):
    model = model_of(dataclasses.replace(SMALL, **kind)).train()
    ids = ids_of(4, 12)
    _, whole = model.hidden_and_balance(ids)
    parts = torch.stack([model.hidden_and_balance(ids[i : i + 1])[1] for i in range(4)])
    torch.testing.assert_close(whole, parts.mean())
    model = model_of(dataclasses.replace(SMALL, seq_aux=False, **kind)).train()
    _, whole = model.hidden_and_balance(ids)
    parts = torch.stack([model.hidden_and_balance(ids[i : i + 1])[1] for i in range(4)])
    assert not torch.isclose(whole, parts.mean(), rtol=1e-5)


def test_the_balance_has_its_coefficient_and_counts_every_layer():
    model = model_of(SMALL).train()
    ids = ids_of(2, 12)
    _, balance = model.hidden_and_balance(ids)
    doubled = model_of(dataclasses.replace(SMALL, router_aux_loss_coef=0.6)).train()
    torch.testing.assert_close(doubled.hidden_and_balance(ids)[1], 2 * balance)
    assert balance > SMALL.router_aux_loss_coef * SMALL.num_hidden_layers * 0.9
    balance.backward()
    # The last layer's experts come after every router, so only what a router reads is moved.
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"} <= moved


def test_where_nothing_is_to_be_balanced_nothing_is_said():
    ids = ids_of(2, 6)
    for model in (
        model_of(SMALL).eval(),
        model_of(dataclasses.replace(SMALL, router_aux_loss_coef=0.0)).train(),
        model_of(dataclasses.replace(SMALL, use_moe=False)).train(),
    ):
        hidden, balance = model.hidden_and_balance(ids)
        assert balance is None
        assert torch.equal(hidden, model(ids))


# In the model


def model_of(config=SMALL, spread=10.0):
    model = MiniMind(config)
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    return model


def ids_of(*shape):
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decoding_with_a_cache_reads_the_same(kind):
    model = model_of(dataclasses.replace(SMALL, **kind)).eval()
    ids = ids_of(2, 14)
    with torch.no_grad():
        whole = model.logits(model(ids))
        cache = KVCache()
        parts = [model(ids[:, :5], cache=cache)]
        parts += [model(ids[:, i : i + 1], cache=cache) for i in range(5, 14)]
    torch.testing.assert_close(model.logits(torch.cat(parts, 1)).detach(), whole, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_do_not_see_each_other():
    model = model_of().eval()
    ids = ids_of(3, 9)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_computed_again_for_its_gradient_gives_the_same():
    plain, again = model_of().train(), model_of().train()
    for layer in again.model.layers:
        layer.forward = lambda *inputs, run=layer.forward: checkpoint(run, *inputs, use_reentrant=False)
    ids = ids_of(2, 10)
    for model in (plain, again):
        hidden, balance = model.hidden_and_balance(ids)
        (hidden.square().sum() + balance).backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


# What dynamo does while it traces, it is warned of itself.
_TRACING = (
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
)


def traced(test):
    for mark in _TRACING:
        test = mark(test)
    return test


@pytest.fixture
def compiled_afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@traced
@pytest.mark.slow
def test_compiled_layers_give_the_same_and_are_not_compiled_again_for_other_sizes(compiled_afresh):
    plain, compiled = model_of().train(), model_of().train()
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")
    num_graphs = []
    for seed in range(4):
        ids = torch.randint(0, SMALL.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
        for model in (plain, compiled):
            model.zero_grad()
            hidden, balance = model.hidden_and_balance(ids)
            (hidden.square().sum() + balance).backward()
        for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] > 0
    assert num_graphs[1] == num_graphs[-1]


@traced
@needs_grouped
def test_the_grouped_way_compiles_as_one_graph(compiled_afresh, monkeypatch):
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: True)
    mixture, x = mixture_of(SMALL), inputs(2, 8, 24)
    whole = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):  # torch traces this kernel in bf16 alone
        torch.testing.assert_close(whole(x)[0], mixture(x)[0])


def test_parameters_have_the_names_of_minimind_and_qwen3_moe():
    names = set(MiniMind(dataclasses.replace(SMALL, n_shared_experts=1)).state_dict())
    mlp = {name.removeprefix("model.layers.1.mlp.") for name in names if ".layers.1.mlp." in name}
    projections = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]
    expected = {"gate.weight"} | {f"experts.{n}.{name}" for n in range(5) for name in projections}
    assert mlp == expected | {f"shared_experts.0.{name}" for name in projections}


@pytest.mark.parametrize(
    "options",
    [{}, {"n_shared_experts": 2}, {"moe_intermediate_size": 8}, {"num_experts_per_tok": 5}],
    ids=str,
)
def test_a_model_s_size_is_known_before_it_is_made(options):
    config = dataclasses.replace(SMALL, **options)
    model = MiniMind(config)
    assert config.num_parameters == count_parameters(model)
    idle = config.num_experts - config.num_experts_per_tok
    one = count_parameters(model.model.layers[0].mlp.experts[0])
    assert config.num_active_parameters == config.num_parameters - idle * one * config.num_hidden_layers


def test_the_line_of_parameters_is_minimind_s():
    assert parameter_line(ModelConfig()) == "Model Params: 63.91M"
    assert parameter_line(ModelConfig(use_moe=True)) == "Model Params: 198.42M-A63.94M"
    all_active = dataclasses.replace(SMALL, num_experts_per_tok=5)
    assert "-A" not in parameter_line(all_active)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_tok": 6}, "`num_experts_per_tok` 6 must be at most `num_experts` 5"),
        ({"num_experts": 0}, "`num_experts` must be from 1"),
        ({"n_shared_experts": -1}, "`n_shared_experts` must be from 0"),
        ({"moe_intermediate_size": 0}, "`moe_intermediate_size` must be from 1"),
        ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be 0 or more"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_grouped_kernel_asks_nothing_of_the_host_and_equals_the_slices(monkeypatch):
    config = dataclasses.replace(SMALL, hidden_size=48, intermediate_size=64)
    mixture, x = mixture_of(config).cuda(), inputs(4, 32, 48).cuda()
    direction = inputs(4, 32, 48, seed=5).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        values_and_gradients(batched, mixture, x, direction)  # once, so that what is made only once is there
        torch.cuda.set_sync_debug_mode("error")
        try:
            grouped = values_and_gradients(batched, mixture, x, direction)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: False)
        slices = values_and_gradients(batched, mixture, x, direction)
    for name, tensor in slices.items():
        torch.testing.assert_close(grouped[name], tensor, rtol=0.05, atol=0.02, msg=name)
