"""The loss of pairs: values by hand, the same numbers through trl, and what it must not depend on."""

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimind_data.dataset.format import IGNORED
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.options import PreferenceOptions
from minimind_train.objectives.preference import REFERENCE, Preference, log_probs_of_pairs

SHAPE = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
)


@pytest.fixture(scope="module")
def model():
    model = MiniMind(SHAPE)
    initialize(model, 3)
    return model


def pairs(count=5, length=12, seed=0):
    """Pairs of which both sides have at least one target, [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = torch.randint(0, 40, (count, length + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[torch.rand(count, length, generator=generator) < 0.4] = IGNORED
        targets[:, -1] = ids[:, -1]
        batch |= {f"{side}_input_ids": ids[:, :-1].contiguous(), f"{side}_targets": targets}
    batch[REFERENCE] = -30 + 3 * torch.randn(count, 2, generator=generator)
    return batch


def cached(micro_batch):
    return micro_batch[REFERENCE]


@torch.no_grad()
def by_hand(model, batch, row, side):
    """The mean and the sum of a side's log-probabilities, token by token."""
    logits = model.logits(model(batch[f"{side}_input_ids"][row : row + 1]))[0].double()
    terms = [
        float(logits[place, target] - logits[place].logsumexp(-1))
        for place, target in enumerate(batch[f"{side}_targets"][row].tolist())
        if target != IGNORED
    ]
    return sum(terms), len(terms)


@pytest.mark.parametrize(
    ("options", "loss_of"),
    [
        ({}, lambda delta, beta: math.log1p(math.exp(-beta * delta))),
        ({"beta": 0.5}, lambda delta, beta: math.log1p(math.exp(-beta * delta))),
        (
            {"label_smoothing": 0.2},
            lambda delta, beta: (
                0.8 * math.log1p(math.exp(-beta * delta)) + 0.2 * math.log1p(math.exp(beta * delta))
            ),
        ),
        ({"loss_type": "hinge"}, lambda delta, beta: max(0.0, 1 - beta * delta)),
        ({"loss_type": "ipo"}, lambda delta, beta: (delta - 1 / (2 * beta)) ** 2),
    ],
)
@pytest.mark.parametrize("length_normalised", [False, True])
def test_losses_and_measures_are_those_derived_by_hand(model, options, loss_of, length_normalised):
    batch = pairs()
    options = PreferenceOptions(**options, length_normalised=length_normalised)
    expected = defaultdict(float)
    for row in range(5):
        gains, log_probs = [], []
        for place, side in enumerate(("chosen", "rejected")):
            summed, length = by_hand(model, batch, row, side)
            divisor = length if length_normalised else 1
            log_probs.append(summed / divisor)
            gains.append((summed - float(batch[REFERENCE][row, place])) / divisor)
        delta = gains[0] - gains[1]
        expected["loss"] += loss_of(delta, options.beta)
        expected["reward_margin"] += options.beta * delta
        expected["reward_accuracy"] += delta > 0
        expected["chosen_reward"] += options.beta * gains[0]
        expected["rejected_reward"] += options.beta * gains[1]
        expected["chosen_log_prob"] += log_probs[0]
        expected["rejected_log_prob"] += log_probs[1]
    with torch.no_grad():
        found = Preference(model, options, cached)(batch)
    assert {"loss": found.summed, **found.metrics} == pytest.approx(dict(expected), rel=1e-4)


@torch.no_grad()
def test_a_model_that_is_its_own_reference_has_the_loss_log_two(model):
    batch = pairs()
    batch[REFERENCE] = log_probs_of_pairs(model, batch)[0].detach()
    found = Preference(model, PreferenceOptions(), cached)(batch)
    assert float(found.summed) == pytest.approx(5 * math.log(2), rel=1e-6)
    assert float(found.metrics["reward_margin"]) == 0


def test_the_gradient_is_that_of_the_paper(model):
    """Equation 7's gradient: beta times sigmoid(-margin), for the chosen one's log-probability less the rejected one's."""
    batch, beta = pairs(count=1), 0.3
    model.zero_grad()
    found = Preference(model, PreferenceOptions(beta=beta), cached)(batch)
    found.summed.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    log_probs = log_probs_of_pairs(model, batch)[0]
    (log_probs[0, 0] - log_probs[0, 1]).backward()
    scale = -beta * torch.sigmoid(-found.metrics["reward_margin"])
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, scale * parameter.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()


@torch.no_grad()
def test_padding_and_micro_batches_have_no_say(model):
    batch = pairs(count=4)
    objective = Preference(model, PreferenceOptions(), cached)
    whole = objective(batch)
    parts = [objective({name: rows[place : place + 1] for name, rows in batch.items()}) for place in range(4)]
    assert float(whole.summed) == pytest.approx(sum(float(part.summed) for part in parts), rel=1e-5)
    longer = {
        name: torch.nn.functional.pad(rows, (0, 7), value=0 if name.endswith("ids") else IGNORED)
        if name != REFERENCE
        else rows
        for name, rows in batch.items()
    }
    assert float(objective(longer).summed) == pytest.approx(float(whole.summed), rel=1e-5)
    assert Preference.num_terms({name: rows.numpy() for name, rows in batch.items()}) == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"beta": 0.0}, "`beta` must be a positive number"),
        ({"beta": float("nan")}, "`beta` must be a positive number"),
        ({"beta": float("inf")}, "`beta` must be a positive number"),
        ({"beta": -0.1}, "`beta` must be a positive number"),
        ({"label_smoothing": -0.01}, "at least 0 and below 0.5"),
        ({"label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "goes with `loss_type` sigmoid, not ipo"),
    ],
)
def test_options_that_mean_nothing(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        PreferenceOptions(**options)


def test_options_at_their_limits_and_by_default():
    assert PreferenceOptions(beta=1e-9, label_smoothing=0.499).label_smoothing == 0.499
    assert PreferenceOptions(loss_type="hinge", label_smoothing=0.0).loss_type == "hinge"
    options = PreferenceOptions()
    assert (options.beta, options.loss_type, options.label_smoothing) == (0.15, "sigmoid", 0.0)
    assert (options.length_normalised, options.reference) == (False, "cached")


def trl_loss(beta, loss_type, log_probs, masks, reference):
    """What trl's DPOTrainer makes of the log-probability of each token, float32 [2B, L], the chosen sequences first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer

    shape = log_probs.shape
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=log_probs, mean_logits=log_probs, is_top1=torch.zeros(shape, dtype=bool)
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=beta, label_smoothing=0.0, use_weighting=False, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(shape[0], shape[1] + 1, dtype=torch.int64),
        "completion_mask": torch.nn.functional.pad(masks, (1, 0)),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_trl_gets_the_same_from_the_same_numbers(model, loss_type):
    batch, beta = pairs(count=6, seed=4), 0.2
    with torch.no_grad():
        ids, targets = (
            torch.cat([batch[f"{side}_{name}"] for side in ("chosen", "rejected")])
            for name in ("input_ids", "targets")
        )
        masks = (targets != IGNORED).long()
        everywhere = model.logits(model(ids)).log_softmax(-1)
        log_probs = everywhere.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * masks
        theirs, metrics = trl_loss(beta, loss_type, log_probs, masks, batch[REFERENCE])
        # trl's IPO, unlike its others, takes means over the tokens.
        options = PreferenceOptions(beta=beta, loss_type=loss_type, length_normalised=loss_type == "ipo")
        ours = Preference(model, options, cached)(batch)
    assert float(ours.summed) / 6 == pytest.approx(float(theirs), rel=1e-5)
    if loss_type == "ipo":
        return
    names = {
        "rewards/margins": "reward_margin",
        "rewards/accuracies": "reward_accuracy",
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "rejected_reward",
        "logps/chosen": "chosen_log_prob",
        "logps/rejected": "rejected_log_prob",
    }
    for name, our_name in names.items():
        assert float(ours.metrics[our_name]) / 6 == pytest.approx(metrics[name][0], rel=1e-4), name
    assert np.isfinite(float(theirs))
