"""Rotary positions, and YaRN, are the papers' formulas and those of transformers."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from minimind_train.model.config import ModelConfig, RopeScaling
from minimind_train.model.rotary import rotary_tables
from minimind_train.model.transformer import MiniMind, initialize

CPU = torch.device("cpu")
YARN = RopeScaling(inference_rope_scaling=True)
CONFIG = ModelConfig(hidden_size=256, num_attention_heads=4, rope_scaling=YARN)


def yarn_angles(config, positions):
    """The paper's formulas (3.2, 3.3) in float64: each frequency by how often it turns in the original context."""
    scaling, size = config.rope_scaling, config.head_size
    original = scaling.yarn_original_max_position_embeddings

    def pair_of(turns):
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = math.floor(pair_of(scaling.yarn_beta_fast)), math.ceil(pair_of(scaling.yarn_beta_slow))
    frequencies = []
    for pair in range(size // 2):
        plain = config.rope_theta ** (-2 * pair / size)
        stretched = min(max((pair - low) / (high - low), 0), 1)
        frequencies.append(plain * (1 - stretched) + plain / scaling.yarn_factor * stretched)
    return np.outer(positions, frequencies)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"yarn_factor": 4.0, "yarn_attention_factor": 1.1386},
        {"yarn_original_max_position_embeddings": 512, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
    ],
    ids=str,
)
def test_yarn_turns_by_the_paper_s_angles(change):
    config = dataclasses.replace(CONFIG, rope_scaling=dataclasses.replace(YARN, **change))
    cos, sin = rotary_tables(90, 120, config, CPU)
    angles = yarn_angles(config, np.arange(90, 120))
    factor = config.rope_scaling.yarn_attention_factor
    np.testing.assert_allclose(cos[:, 0].numpy(), np.cos(angles) * factor, atol=3e-5)
    np.testing.assert_allclose(sin[:, 0].numpy(), np.sin(angles) * factor, atol=3e-5)


def test_yarn_leaves_quick_pairs_alone_and_stretches_slow_ones_in_full():
    plain = dataclasses.replace(CONFIG, rope_scaling=RopeScaling())
    (_, before), (_, after) = (rotary_tables(1, 2, config, CPU) for config in (plain, CONFIG))
    angles_before, angles_after = before.asin().flatten(), after.asin().flatten()
    torch.testing.assert_close(angles_after[:6], angles_before[:6])
    torch.testing.assert_close(angles_after[-8:], angles_before[-8:] / 16)
    assert (angles_after[:-1] > angles_after[1:]).all()


def test_without_the_switch_its_numbers_mean_nothing():
    off = dataclasses.replace(
        CONFIG, rope_scaling=RopeScaling(yarn_factor=3.0, yarn_attention_factor=2.0, yarn_beta_fast=9.0)
    )
    plain = dataclasses.replace(CONFIG, rope_scaling=RopeScaling())
    for one, other in zip(rotary_tables(0, 50, off, CPU), rotary_tables(0, 50, plain, CPU), strict=True):
        assert torch.equal(one, other)


def test_a_stretched_model_reads_further():
    scaling = RopeScaling(
        inference_rope_scaling=True, yarn_factor=2.0, yarn_original_max_position_embeddings=24
    )
    config = ModelConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        max_position_embeddings=24,
    )
    ids = torch.zeros(1, 48, dtype=torch.int64)
    model = MiniMind(dataclasses.replace(config, rope_scaling=scaling))
    initialize(model, 0)
    assert model(ids).shape == (1, 48, 16)
    with pytest.raises(ValueError, match="49 tokens is longer than max_position_embeddings, which is 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match="which is 24"):
        MiniMind(config)(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yarn_factor": 0.5}, "`yarn_factor` must be from 1"),
        ({"yarn_factor": float("nan")}, "yarn_factor"),
        ({"yarn_original_max_position_embeddings": 0}, "yarn_original_max_position_embeddings"),
        (
            {"yarn_beta_slow": 40.0},
            "`yarn_beta_slow` 40.0 must be positive and at most `yarn_beta_fast` 32.0",
        ),
        ({"yarn_beta_slow": 0.0}, "yarn_beta_slow"),
        ({"yarn_attention_factor": 0.0}, "`yarn_attention_factor` must be a positive number"),
    ],
)
def test_impossible_stretchings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


def test_stretching_needs_a_base_above_one():
    with pytest.raises(
        ValueError, match="`rope_theta` must be above 1 for `inference_rope_scaling`, not 0.5"
    ):
        ModelConfig(rope_theta=0.5, rope_scaling=YARN)
