"""Objectives put a micro-batch through the model: the next token, and what all of them have in common."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from minimind_data.dataset.format import IGNORED
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
}  # fmt: skip


def make_model(**changes):
    model = MiniMind(ModelConfig(**SHAPE, **changes))
    initialize(model, 3)
    return model


def batch_of(count=3, length=9):
    ids = torch.randint(0, 40, (count, length + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, 4:] = IGNORED
    return {"input_ids": ids[:, :-1].contiguous(), "targets": targets}


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_of_the_next_token_is_the_cross_entropy_of_the_models_logits(apart):
    model, batch = make_model(), batch_of()
    if apart:
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]] * 3)
    found = NextToken(model)(batch)
    hidden, _ = model.hidden_and_balance(batch["input_ids"], position_ids=batch.get("position_ids"))
    logits = model.logits(hidden).flatten(0, 1)
    expected = functional.cross_entropy(
        logits, batch["targets"].flatten(), reduction="sum", ignore_index=IGNORED
    )
    torch.testing.assert_close(found.summed, expected)
    assert found.auxiliary is None
    assert found.metrics == {}
    if apart:
        together = NextToken(model)({name: batch[name] for name in ("input_ids", "targets")})
        assert not torch.isclose(found.summed, together.summed)


@torch.no_grad()
def test_the_loss_that_balances_experts_comes_along():
    model, batch = make_model(use_moe=True, num_experts=4, router_aux_loss_coef=0.1), batch_of()
    model.train()
    _, balance = model.hidden_and_balance(batch["input_ids"])
    found = NextToken(model)(batch)
    assert balance is not None
    assert torch.equal(found.auxiliary, balance)


def test_its_terms_are_the_targets_that_are_learned():
    arrays = {name: tensor.numpy() for name, tensor in batch_of().items()}
    assert NextToken.num_terms(arrays) == 3 * 9 - 5
    nothing = np.full((2, 3), IGNORED)
    assert NextToken.num_terms({"input_ids": nothing, "targets": nothing}) == 0


@pytest.mark.parametrize("training", [False, True])
def test_an_objective_is_in_the_mode_of_its_model(training):
    assert NextToken(make_model().train(training)).training is training
