"""Chunked losses are those of torch on all logits, with their gradients, in every dtype."""

import pytest
import torch
from torch.nn import functional

from minimind_data.dataset.format import IGNORED
from minimind_train.objectives import losses
from minimind_train.objectives.losses import summed_cross_entropy, summed_log_probs

HIDDEN, VOCAB = 16, 37


@pytest.fixture(params=[1, 7, 4096], ids=lambda tokens: f"chunks of {tokens}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(losses, "_MIN_CHUNK_TOKENS", request.param)


def make(num_tokens, ignored=0.3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, num_tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    targets = torch.randint(0, VOCAB, (1, num_tokens), generator=generator)
    targets[torch.rand(1, num_tokens, generator=generator) < ignored] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden, weight, targets):
    logits = functional.linear(hidden, weight).float().flatten(0, -2)
    return functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)


def on_all_tokens(hidden, weight, targets):
    """The road of devices that do not look for the padding first."""
    return losses._ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), hidden.dtype)


def results(loss_function, hidden, weight, targets, scale=1.0):
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    loss = loss_function(hidden, weight, targets)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("road", [summed_cross_entropy, on_all_tokens])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 31, 64])
@pytest.mark.usefixtures("chunk")
def test_loss_and_gradients_are_those_of_cross_entropy(num_tokens, road):
    inputs = make(num_tokens)
    for ours, expected in zip(results(road, *inputs, 0.37), results(plain, *inputs, 0.37), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("road", [summed_cross_entropy, on_all_tokens])
@pytest.mark.usefixtures("chunk")
def test_nothing_to_learn_gives_zero_loss_and_zero_gradients(road):
    hidden, weight, targets = make(9, ignored=2.0)
    assert (targets == IGNORED).all()
    loss, grad_hidden, grad_weight = results(road, hidden, weight, targets)
    assert loss == 0
    assert torch.equal(grad_hidden, torch.zeros_like(hidden))
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("road", [summed_cross_entropy, on_all_tokens])
def test_with_one_token_there_is_nothing_to_learn(road):
    hidden, weight, targets = make(9)
    targets = targets.clamp(max=0)
    loss, grad_hidden, grad_weight = results(road, hidden, weight[:1], targets)
    assert {0, IGNORED} == set(targets.flatten().tolist())
    assert loss == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("chunk")
def test_autocast_keeps_the_sum_in_float32(dtype):
    hidden, weight, targets = make(64)
    with torch.autocast("cpu", dtype):
        loss, *gradients = results(summed_cross_entropy, hidden, weight, targets)
        expected_loss, *expected = results(plain, hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


def test_bf16_hidden_states_and_weights_get_bf16_gradients():
    hidden, weight, targets = make(64, dtype=torch.bfloat16)
    loss, grad_hidden, grad_weight = results(summed_cross_entropy, hidden, weight, targets)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("chunk")
def test_repeated_calls_agree_bit_for_bit(autocast):
    inputs = make(200)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = results(summed_cross_entropy, *inputs)
        for _ in range(3):
            assert all(
                torch.equal(a, b) for a, b in zip(first, results(summed_cross_entropy, *inputs), strict=True)
            )


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, targets = make(50)
    with torch.no_grad():
        loss = summed_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert torch.equal(loss, summed_cross_entropy(hidden, weight, targets).detach())
    frozen = summed_cross_entropy(hidden.detach(), weight, targets)
    frozen.backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_the_sum_over_parts_is_the_sum():
    hidden, weight, targets = make(60)
    whole = results(summed_cross_entropy, hidden, weight, targets)
    parts = [
        results(summed_cross_entropy, hidden[:, part], weight, targets[:, part])
        for part in (slice(0, 11), slice(11, 60))
    ]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(whole[1], torch.cat([parts[0][1], parts[1][1]], dim=1))
    torch.testing.assert_close(whole[2], parts[0][2] + parts[1][2], rtol=1e-5, atol=1e-5)


def test_many_equal_targets_do_not_overflow_the_gradient_in_fp16():
    num_tokens = 5000
    hidden, weight, targets = make(num_tokens)
    targets = torch.zeros_like(targets)
    with torch.no_grad():
        hidden.abs_().add_(20)
        weight.zero_()
    with torch.autocast("cpu", torch.float16):
        _, _, gradient = results(summed_cross_entropy, hidden, weight, targets)
    _, _, expected = results(plain, hidden, weight, targets)
    assert expected.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learning", [True, False])
def test_no_tensor_as_large_as_all_logits_is_made(learning, dtype):
    num_tokens, vocab = 3000, 2**13
    hidden = torch.zeros(1, num_tokens, 8, requires_grad=True)
    weight = torch.zeros(vocab, 8, requires_grad=True)
    targets = torch.zeros(1, num_tokens, dtype=torch.int64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with (
        torch.set_grad_enabled(learning),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        Watch(),
    ):
        loss = summed_cross_entropy(hidden, weight, targets)
        if learning:
            loss.backward()
    assert 0 < largest <= losses._CHUNK_LOGITS < num_tokens * vocab / 5


def test_huge_logits_do_not_overflow():
    hidden, weight, targets = make(8, ignored=0)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss, grad_hidden, grad_weight = results(summed_cross_entropy, hidden, weight, targets)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad_hidden).all()
    assert torch.isfinite(grad_weight).all()


def plain_log_probs(hidden, weight, targets):
    log_probs = functional.linear(hidden, weight).float().log_softmax(-1)
    learned = targets != IGNORED
    chosen = log_probs.gather(-1, targets.where(learned, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(learned, 0.0).sum(-1)


def log_probs_of_all_tokens(hidden, weight, targets):
    """The road of devices that do not look for the padding first."""
    found = losses._ChunkedLogProbs.apply(hidden.flatten(0, -2), weight, targets.flatten(), hidden.dtype)
    return found.view_as(targets).sum(-1)


def worth(function, inputs):
    """Sequences whose log-probabilities are worth different amounts, and the gradients of what they are worth together."""
    hidden, weight, targets = inputs
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    found = function(hidden, weight, targets)
    (found * torch.tensor([0.5, -2.0, 1.25])).sum().backward()
    return found.detach(), hidden.grad, weight.grad


def make_sequences(num_tokens, **options):
    hidden, weight, targets = make(3 * num_tokens, **options)
    return hidden.detach().view(3, num_tokens, HIDDEN), weight, targets.view(3, num_tokens)


@pytest.mark.parametrize("road", [summed_log_probs, log_probs_of_all_tokens])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 31])
@pytest.mark.usefixtures("chunk")
def test_the_log_probability_of_each_sequence_and_its_gradients(num_tokens, road):
    inputs = make_sequences(num_tokens)
    for ours, expected in zip(worth(road, inputs), worth(plain_log_probs, inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("road", [summed_log_probs, log_probs_of_all_tokens])
def test_the_one_token_that_there_is_is_certain(road):
    hidden, weight, targets = make_sequences(9)
    found, grad_hidden, grad_weight = worth(road, (hidden, weight[:1], targets.clamp(max=0)))
    assert torch.equal(found, torch.zeros(3))
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.usefixtures("chunk")
def test_log_probabilities_under_autocast():
    inputs = make_sequences(20)
    with torch.autocast("cpu", torch.bfloat16):
        found, *gradients = worth(summed_log_probs, inputs)
        expected, *others = worth(plain_log_probs, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, others, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_log_probabilities_are_the_cross_entropy_with_another_sign():
    hidden, weight, targets = make_sequences(30)
    assert torch.allclose(
        -summed_log_probs(hidden, weight, targets).sum(), summed_cross_entropy(hidden, weight, targets)
    )


def test_a_sequence_with_nothing_to_learn_is_worth_nothing():
    hidden, weight, targets = make_sequences(9, ignored=2.0)
    found, grad_hidden, grad_weight = worth(summed_log_probs, (hidden, weight, targets))
    assert torch.equal(found, torch.zeros(3))
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("function", [summed_cross_entropy, summed_log_probs])
def test_a_frozen_output_matrix_gets_no_gradient_and_hidden_states_the_same(function):
    hidden, weight, targets = make_sequences(30)
    grads = []
    for frozen in (False, True):
        states = hidden.clone().requires_grad_()
        matrix = weight.detach().clone().requires_grad_(not frozen)
        function(states, matrix, targets).sum().backward()
        grads.append(states.grad)
        assert (matrix.grad is None) is frozen
    assert torch.equal(*grads)


@pytest.mark.parametrize("function", [summed_cross_entropy, summed_log_probs])
def test_gradients_that_nobody_asks_for_are_not_computed(function, monkeypatch):
    products, real = [], losses._add_product
    monkeypatch.setattr(losses, "_add_product", lambda *given: (products.append(1), real(*given)))
    hidden, weight, targets = make_sequences(30)
    hidden.requires_grad_()
    with torch.no_grad():
        function(hidden, weight, targets)
    function(hidden, weight.detach(), targets).sum().backward()
    assert products == []
    function(hidden, weight, targets).sum().backward()
    assert products == [1]
