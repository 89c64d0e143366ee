"""fp16 and its loss scale, TF32, and what `auto` means."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from minimind_train.batches.steps import StepBatch
from minimind_train.model.config import ModelConfig
from minimind_train.model.precision import LossScale, allow_tf32, autocast, resolve_dtype
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.run import learner as run_learner
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.training.learner import Compute
from minimind_train.training.optim import make_optimizer
from minimind_train.training.options import OptimizerOptions
from minimind_train.training.step import NotFiniteError, take_step
from tests.helpers.loops import learner_of
from tests.helpers.runs import Said, metrics, stop_after, weights

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=30
)
HUGE = 2.0**40  # a gradient that is scaled by it leaves fp16


def step_taker(scale=None):
    """Return a function that takes one step on a batch of its own, and the model it moves."""
    model = MiniMind(CONFIG)
    initialize(model, 0)
    learner = learner_of(NextToken(model).train(), OptimizerOptions(learning_rate=0.01), scale=scale)

    def learn(step, dtype="fp16"):
        batch = batch_of(step)
        return take_step(
            replace(learner, compute=Compute(device=CPU, dtype=dtype)),
            StepBatch(start=0, stop=4, micro_batches=[batch], num_targets=32, num_terms=32, num_windows=4),
            rate=0.01,
        )

    return learn, model


def batch_of(step):
    tokens = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}


def state_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_steps_are_those_of_torchs_own_scaler():
    scale = LossScale(value=HUGE)
    learn, model = step_taker(scale)
    theirs = MiniMind(CONFIG)
    initialize(theirs, 0)
    objective, optimizer = NextToken(theirs), make_optimizer(theirs, OptimizerOptions(learning_rate=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=HUGE)
    skipped = []
    for step in range(1, 41):
        optimizer.zero_grad()
        with autocast("fp16", CPU):
            loss = objective(batch_of(step)).summed / 32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        scaler.step(optimizer)
        former = scaler.get_scale()
        scaler.update()
        before = state_of(model)
        result = learn(step)
        if scaler.get_scale() < former:
            skipped.append(step)
            assert result.grad_norm is None
            assert all(map(torch.equal, before, state_of(model)))
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert scale.value == scaler.get_scale()
    assert 5 < len(skipped) == scale.skipped_steps < 35
    assert skipped[:5] == [1, 2, 3, 4, 5]
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_scale_follows_torchs_rule_over_thousands_of_steps():
    scale = LossScale()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    for step in range(9000):
        overflows = step in {0, 1, 2001, 2002, 4003, 4004, 8100}
        parameter.grad = torch.full((1,), math.inf if overflows else 1.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scale.skips(1.0, math.inf if overflows else 1.0) is overflows
        assert scale.value == scaler.get_scale()
    assert scale.skipped_steps == 7


def test_the_scale_never_leaves_its_bounds():
    scale = LossScale(value=2.0**31)
    for _ in range(6000):
        scale.skips(1.0, 0.0)
    assert scale.value == 2.0**32
    skipped = 0
    while scale.skips(1.0, math.nan):
        skipped += 1
    assert (skipped, scale.value) == (32, 1.0)


def test_a_step_in_fp16_is_near_that_in_fp32():
    (half, _), (single, _) = step_taker(LossScale()), step_taker()
    for step in range(1, 4):
        near, exact = half(step), single(step, "fp32")
        assert near.loss == pytest.approx(exact.loss, rel=2e-3)
        assert near.grad_norm == pytest.approx(exact.grad_norm, rel=2e-2)


def test_a_gradient_that_overflows_without_any_scale_is_an_error():
    scale = LossScale(value=1.0)
    learn, model = step_taker(scale)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e4)
        model.model.embed_tokens.weight.mul_(1e4)
    before = state_of(model)
    with pytest.raises(NotFiniteError, match="^the "):
        learn(3)
    assert all(map(torch.equal, before, state_of(model)))
    assert scale.skipped_steps == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_matter_of_scale(loss):
    scale = LossScale()
    assert not scale.skips(loss, math.nan)
    assert scale == LossScale()


@pytest.fixture
def overflowing(monkeypatch):
    """Runs in fp16 begin with a scale that is too large."""
    monkeypatch.setattr(run_learner, "LossScale", lambda **told: LossScale(**{"value": HUGE, **told}))


@pytest.mark.usefixtures("overflowing")
def test_a_run_in_fp16_skips_what_overflows_and_resumes_bit_for_bit(begin, tmp_path):
    run = tmp_path / "run"
    outcome, _ = begin(dtype="fp16", steps=24, keep=0)
    whole, lines = weights(run, 24), metrics(run)
    skipped = [line["step"] for line in lines if "grad_norm" not in line]
    assert skipped[:3] == [1, 2, 3]
    assert 3 < len(skipped) < 21
    # A step that is skipped has its number and its samples all the same.
    assert [line["position"] for line in lines] == [8 * step for step in range(1, 25)]
    assert lines[-1]["skipped_steps"] == len(skipped)
    assert lines[-1]["loss_scale"] == HUGE / 2 ** len(skipped)
    assert outcome.step == 24
    for step in (3, 21):  # while the scale is still falling, and after
        stop_after(run, step)
        resume(run, {}, say=Said())
        assert weights(run, 24) == whole
        assert metrics(run) == lines
    assert checkpoint.load(run, 24).state.loss_scale == {
        "value": lines[-1]["loss_scale"],
        "steady_steps": 24 - skipped[-1],
        "skipped_steps": len(skipped),
    }


def test_the_scale_goes_when_the_dtype_does(begin, tmp_path):
    run = tmp_path / "run"
    begin(dtype="fp16", steps=3)
    resume(run, {"dtype": "fp32", "steps": 6}, allow_change={"dtype", "steps"}, say=Said())
    assert checkpoint.load(run, 6).state.loss_scale is None
    assert [("loss_scale" in line) for line in metrics(run)] == [True] * 3 + [False] * 3
    resume(run, {"dtype": "fp16", "steps": 9}, allow_change={"dtype", "steps"}, say=Said())
    assert checkpoint.load(run, 9).state.loss_scale == {
        "value": 2.0**16,
        "steady_steps": 3,
        "skipped_steps": 0,
    }


def test_auto_is_what_the_device_multiplies_natively(monkeypatch):
    cuda = torch.device("cuda")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert resolve_dtype("auto", cuda) == expected
        assert resolve_dtype("fp16", cuda) == "fp16"


@pytest.mark.parametrize(
    ("capability", "allowed", "precision"),
    [((8, 0), True, "high"), ((9, 0), False, "highest"), ((7, 5), True, "highest")],
)
def test_tf32_is_used_where_a_gpu_has_it_and_it_may_be(monkeypatch, capability, allowed, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        assert allow_tf32(torch.device("cuda"), allowed=allowed) is (precision == "high")
        assert torch.get_float32_matmul_precision() == precision
    assert not allow_tf32(CPU, allowed=True)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_rounds_products_on_a_gpu():
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("no TF32")
    a, b = (torch.randn(256, 256, device=device) for _ in range(2))
    exact = (a.double() @ b.double()).float()
    try:
        assert allow_tf32(device, allowed=True)
        rounded = (a @ b - exact).abs().max()
    finally:
        allow_tf32(device, allowed=False)
    assert rounded > 10 * (a @ b - exact).abs().max()
