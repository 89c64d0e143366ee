"""The optimizers and the schedule are the formulas, and a saved state goes on as one that was never saved."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from minimind_data.errors import UserError
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.tensors import tensors_of
from minimind_train.training.optim import clip_gradients, learning_rate, make_optimizer
from minimind_train.training.options import OptimizerOptions

PEAK = 5e-4


def test_schedule_falls_from_the_peak_to_a_tenth():
    config = OptimizerOptions()
    assert learning_rate(1, 10**9, config) == pytest.approx(PEAK)
    assert learning_rate(500, 1000, config) == pytest.approx(PEAK * 0.55)
    assert learning_rate(1000, 1000, config) == pytest.approx(PEAK * 0.1)
    assert learning_rate(1, 1, config) == pytest.approx(PEAK * 0.1)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates == sorted(rates, reverse=True)


def test_schedule_at_a_step_is_the_formula():
    assert learning_rate(3, 7, OptimizerOptions(learning_rate=1.0)) == 0.1 + 0.45 * (
        1 + math.cos(math.pi * 3 / 7)
    )


def test_warm_up_rises_and_then_leaves_the_schedule_alone():
    plain, warm = OptimizerOptions(), OptimizerOptions(warmup_steps=10)
    for step in range(1, 10):
        assert learning_rate(step, 100, warm) == learning_rate(step, 100, plain) * step / 10
    for step in range(10, 101):
        assert learning_rate(step, 100, warm) == learning_rate(step, 100, plain)
    assert learning_rate(5, 5, OptimizerOptions(warmup_steps=10)) == pytest.approx(PEAK * 0.1 / 2)


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="is not between 1 and 10"):
        learning_rate(step, 10, OptimizerOptions())


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"learning_rate": math.nan},
        {"warmup_steps": -1},
        {"warmup_steps": 10**400},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"muon_momentum": 1.0},
        {"grad_clip": -1.0},
        {"grad_clip": math.nan},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizerOptions(**options)


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 70), nn.SiLU(), nn.LayerNorm(70), nn.Linear(70, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return model


def train(model, optimizer, steps):
    for step in steps:
        batch = torch.randn(6, 33, generator=torch.Generator().manual_seed(step))
        model(batch).square().sum().backward()
        clip_gradients(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, OptimizerOptions(learning_rate=1e-2))
        optimizer.step()
        optimizer.zero_grad()


def test_all_parameters_are_trained_with_the_options():
    model = network()
    optimizer = make_optimizer(
        model, OptimizerOptions(learning_rate=0.1, weight_decay=0.2, beta1=0.3, beta2=0.4, eps=0.5)
    )
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.1, 0.2, (0.3, 0.4), 0.5)


def test_a_step_is_adamw_from_its_formulas():
    config = OptimizerOptions(learning_rate=0.1, weight_decay=0.2, beta1=0.7, beta2=0.8, eps=1e-3)
    model = nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(model, config)
    weight = model.weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step)).double()
        model.weight.grad = gradient.float()
        optimizer.step()
        first = 0.7 * first + 0.3 * gradient
        second = 0.8 * second + 0.2 * gradient**2
        weight -= 0.1 * 0.2 * weight
        weight -= 0.1 * (first / (1 - 0.7**step)) / ((second / (1 - 0.8**step)).sqrt() + 1e-3)
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stopped_after", [1, 4, 9])
def test_resumed_from_its_state_it_gives_the_same_weights_bit_for_bit(stopped_after):
    whole, steps = network(), range(1, 11)
    train(whole, make_optimizer(whole, OptimizerOptions()), steps)

    first = network()
    optimizer = make_optimizer(first, OptimizerOptions())
    train(first, optimizer, steps[:stopped_after])
    stored = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)

    second = network(seed=99)
    second.load_state_dict(state["model"])
    optimizer = make_optimizer(second, OptimizerOptions())
    optimizer.load_state_dict(state["optimizer"])
    train(second, optimizer, steps[stopped_after:])
    for expected, ours in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, ours)


def test_state_is_plain_float32_tensors():
    model = network()
    optimizer = make_optimizer(model, OptimizerOptions())
    train(model, optimizer, [1])
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {(type(tensor), tensor.dtype) for tensor in state.values()} == {(torch.Tensor, torch.float32)}
        assert state["exp_avg"].shape == parameter.shape


def test_repeated_training_agrees_bit_for_bit():
    models = [network() for _ in range(3)]
    for model in models:
        train(model, make_optimizer(model, OptimizerOptions()), range(1, 6))
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(parameters[0], parameters[1])
        assert torch.equal(parameters[0], parameters[2])


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_clipping_scales_to_the_norm_and_returns_what_it_was():
    model = network()
    model(torch.ones(2, 33)).square().sum().mul(100).backward()
    before = copy.deepcopy(gradients(model))
    norm = clip_gradients(model.parameters(), 0.5)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(gradients(model), before / before.norm() * 0.5)


@pytest.mark.parametrize("max_norm", [0.0, 1e9])
def test_gradients_below_the_norm_are_left_alone(max_norm):
    model = network()
    model(torch.ones(2, 33)).square().sum().mul(100).backward()
    before = copy.deepcopy(gradients(model))
    torch.testing.assert_close(clip_gradients(model.parameters(), max_norm), before.norm())
    assert torch.equal(gradients(model), before)


SMALL = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=30,
    use_moe=True,
    num_experts=2,
)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first with Muon")
MUON = OptimizerOptions(optimizer="muon", learning_rate=0.02, weight_decay=0.1)


def mixture(seed=0):
    model = MiniMind(SMALL)
    initialize(model, seed)
    return model


def learn(model, optimizer, steps):
    objective = NextToken(model)
    for step in steps:
        tokens = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, MUON)
        optimizer.zero_grad()
        objective({"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}).summed.backward()
        optimizer.step()


@needs_muon
def test_muon_has_the_matrices_inside_of_layers_and_adamw_the_rest():
    model = mixture()
    muon, adamw = make_optimizer(model, MUON).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in (muon, adamw):
        assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)
    orthogonal, other = ({names[id(each)] for each in group["params"]} for group in (muon, adamw))
    assert orthogonal | other == set(names.values())
    assert len(orthogonal) == 2 * (4 + 2 * 3)
    assert other == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(
            f"model.layers.{layer}.{name}.weight"
            for layer in (0, 1)
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
                "mlp.gate",
            )
        ),
    }


@needs_muon
def test_a_step_of_muon_brings_the_singular_values_of_the_momentum_near_one():
    model = mixture()
    optimizer = make_optimizer(model, MUON)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    momentum = dict.fromkeys(before, 0.0)
    for step in (1, 2, 3):
        for number, (_, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if "_proj" not in name:
                continue
            momentum[name] = 0.95 * momentum[name] + 0.05 * parameter.grad
            looked_ahead = 0.95 * momentum[name] + 0.05 * parameter.grad
            moved = before[name] * (1 - 0.02 * 0.1) - parameter.detach()
            size = 0.02 * 0.2 * max(parameter.shape) ** 0.5
            left, values, right = torch.linalg.svd(looked_ahead, full_matrices=False)
            values = values / values.norm()
            for _ in range(5):  # Newton-Schulz is a polynomial of the singular values, and turns nothing
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            torch.testing.assert_close(left.T @ (moved / size) @ right.T, values.diag(), rtol=0, atol=0.15)
            assert values.median() == pytest.approx(1, abs=0.35)
        before = {name: each.detach().clone() for name, each in model.named_parameters()}


@needs_muon
def test_beside_muon_adamw_does_what_it_does_alone():
    alone, beside = mixture(), mixture()
    optimizers = [
        make_optimizer(alone, OptimizerOptions(learning_rate=0.02, weight_decay=0.1)),
        make_optimizer(beside, MUON),
    ]
    for model, optimizer in zip((alone, beside), optimizers, strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for (name, one), other in zip(alone.named_parameters(), beside.parameters(), strict=True):
        assert torch.equal(one, other) is ("_proj" not in name)


@needs_muon
@pytest.mark.parametrize("stopped_after", [0, 1, 4])
def test_muon_resumes_from_a_checkpoint_bit_for_bit(tmp_path, stopped_after):
    whole, steps = mixture(), range(1, 8)
    learn(whole, make_optimizer(whole, MUON), steps)
    first = mixture()
    optimizer = make_optimizer(first, MUON)
    learn(first, optimizer, steps[:stopped_after])
    state = checkpoint.CheckpointState(step=stopped_after, position=0, config={}, dataset="", metrics_lines=0)
    checkpoint.save(tmp_path, state, tensors_of(first, optimizer))
    second = mixture(seed=9)
    optimizer = make_optimizer(second, MUON)
    checkpoint.load(tmp_path, stopped_after).restore(second, optimizer)
    learn(second, optimizer, steps[stopped_after:])
    for expected, ours in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, ours)


def test_a_torch_without_muon_is_told_of(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=r"`optimizer` muon needs torch 2\.9"):
        make_optimizer(mixture(), MUON)


def test_what_is_not_learned_is_not_moved():
    model = network()
    model[0].weight.requires_grad_(False)
    (group,) = make_optimizer(model, OptimizerOptions()).param_groups
    assert len(group["params"]) == 5
