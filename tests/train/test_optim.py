import copy
import io
import math

import pytest
import torch
from torch import nn

from minimind_train.optim import OptimConfig, clip_gradients, learning_rate, make_optimizer

PEAK = 5e-4


def test_schedule_falls_from_the_peak_to_a_tenth():
    config = OptimConfig()
    assert learning_rate(1, 10**9, config) == pytest.approx(PEAK)
    assert learning_rate(500, 1000, config) == pytest.approx(PEAK * 0.55)
    assert learning_rate(1000, 1000, config) == pytest.approx(PEAK * 0.1)
    assert learning_rate(1, 1, config) == pytest.approx(PEAK * 0.1)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates == sorted(rates, reverse=True)


def test_schedule_at_a_step_is_the_formula():
    assert learning_rate(3, 7, OptimConfig(learning_rate=1.0)) == 0.1 + 0.45 * (1 + math.cos(math.pi * 3 / 7))


def test_warm_up_rises_and_then_leaves_the_schedule_alone():
    plain, warm = OptimConfig(), OptimConfig(warmup_steps=10)
    for step in range(1, 10):
        assert learning_rate(step, 100, warm) == learning_rate(step, 100, plain) * step / 10
    for step in range(10, 101):
        assert learning_rate(step, 100, warm) == learning_rate(step, 100, plain)
    assert learning_rate(5, 5, OptimConfig(warmup_steps=10)) == pytest.approx(PEAK * 0.1 / 2)


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="is not between 1 and 10"):
        learning_rate(step, 10, OptimConfig())


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
        {"grad_clip": -1.0},
        {"grad_clip": math.nan},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimConfig(**options)


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
            group["lr"] = learning_rate(step, 20, OptimConfig(learning_rate=1e-2))
        optimizer.step()
        optimizer.zero_grad()


def test_all_parameters_are_trained_with_the_options():
    model = network()
    optimizer = make_optimizer(
        model, OptimConfig(learning_rate=0.1, weight_decay=0.2, beta1=0.3, beta2=0.4, eps=0.5)
    )
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.1, 0.2, (0.3, 0.4), 0.5)


def test_a_step_is_adamw_from_its_formulas():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.2, beta1=0.7, beta2=0.8, eps=1e-3)
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
    train(whole, make_optimizer(whole, OptimConfig()), steps)

    first = network()
    optimizer = make_optimizer(first, OptimConfig())
    train(first, optimizer, steps[:stopped_after])
    stored = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)

    second = network(seed=99)
    second.load_state_dict(state["model"])
    optimizer = make_optimizer(second, OptimConfig())
    optimizer.load_state_dict(state["optimizer"])
    train(second, optimizer, steps[stopped_after:])
    for expected, ours in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, ours)


def test_state_is_plain_float32_tensors():
    model = network()
    optimizer = make_optimizer(model, OptimConfig())
    train(model, optimizer, [1])
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert {(type(tensor), tensor.dtype) for tensor in state.values()} == {(torch.Tensor, torch.float32)}
        assert state["exp_avg"].shape == parameter.shape


def test_repeated_training_agrees_bit_for_bit():
    models = [network() for _ in range(3)]
    for model in models:
        train(model, make_optimizer(model, OptimConfig()), range(1, 6))
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
