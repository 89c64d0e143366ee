"""The model computes what its formulas say, in one pass or token by token, in whatever precision."""

import dataclasses

import numpy as np
import pytest
import torch

from minimind_train.model.config import ModelConfig
from minimind_train.model.rotary import rotary_tables, rotate
from minimind_train.model.transformer import Attention, KVCache, MiniMind, initialize
from tests.helpers.models import count_parameters
from tests.helpers.runs import SMALL_MODEL


def make(config=SMALL_MODEL, seed=0, spread=10.0):
    """A model with large weights and uneven norms, so that every part of it shows in the logits."""
    model = MiniMind(config)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(spread)
    return model.eval()


def ids_of(*shape, vocab=SMALL_MODEL.vocab_size, seed=3):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, cache=None):
    with torch.no_grad():
        return model.logits(model(ids, cache=cache))


def reference_logits(config, weights, ids):
    """The model from its formulas, one sequence, position by position, in float64."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    size, group = config.head_size, config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / np.sqrt((x * x).mean() + config.rms_norm_eps) * weight

    def turn(x, position):
        """Pairs (i, i + size/2) as complex numbers times exp(i·angle)."""
        angles = position * config.rope_theta ** (-2.0 * np.arange(size // 2) / size)
        turned = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    def attend(prefix, xs):
        def heads(name, x):
            return (w[f"{prefix}.{name}.weight"] @ x).reshape(-1, size)

        queries, keys, values = ([heads(name, x) for x in xs] for name in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm:
            queries = [[norm(head, w[f"{prefix}.q_norm.weight"]) for head in one] for one in queries]
            keys = [[norm(head, w[f"{prefix}.k_norm.weight"]) for head in one] for one in keys]
        out = []
        for t in range(len(xs)):
            mixed = []
            for head in range(config.num_attention_heads):
                query = turn(queries[t][head], t)
                scores = np.array([query @ turn(keys[s][head // group], s) for s in range(t + 1)]) / np.sqrt(
                    size
                )
                chances = np.exp(scores - scores.max())
                chances /= chances.sum()
                mixed.append(sum(chance * values[s][head // group] for s, chance in enumerate(chances)))
            out.append(w[f"{prefix}.o_proj.weight"] @ np.concatenate(mixed))
        return out

    def mlp(prefix, x):
        gate = w[f"{prefix}.gate_proj.weight"] @ x
        return w[f"{prefix}.down_proj.weight"] @ (
            gate / (1 + np.exp(-gate)) * (w[f"{prefix}.up_proj.weight"] @ x)
        )

    xs = [w["model.embed_tokens.weight"][i] for i in ids.tolist()]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        mixed = attend(f"{name}.self_attn", [norm(x, w[f"{name}.input_layernorm.weight"]) for x in xs])
        xs = [x + m for x, m in zip(xs, mixed, strict=True)]
        xs = [x + mlp(f"{name}.mlp", norm(x, w[f"{name}.post_attention_layernorm.weight"])) for x in xs]
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in xs])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": False},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": 10, "rope_theta": 100.0},
        {"rms_norm_eps": 0.3},
    ],
    ids=str,
)
def test_logits_are_those_of_the_formulas(change):
    config = dataclasses.replace(SMALL_MODEL, **change)
    model = make(config)
    ids = ids_of(2, 17)
    ours = logits_of(model, ids).numpy()
    for row in range(2):
        expected = reference_logits(config, model.state_dict(), ids[row])
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(ours[row], expected, rtol=2e-4, atol=2e-4)


def test_golden_logits_of_a_seed():
    model = MiniMind(SMALL_MODEL)
    initialize(model, 42)
    logits = logits_of(model, torch.tensor([[1, 2, 3, 4]]))[0, -1, :4]
    torch.testing.assert_close(
        logits, torch.tensor([-0.0792999, -0.025113, 0.0548103, -0.0888014]), rtol=0, atol=1e-5
    )


def test_a_token_changes_nothing_before_it():
    model = make()
    ids = ids_of(1, 16)
    before = logits_of(model, ids)
    for t in (0, 7, 15):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL_MODEL.vocab_size
        after = logits_of(model, changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.isclose(before[:, t:], after[:, t:]).all(-1).any()


def test_rows_of_a_batch_do_not_see_each_other():
    model = make()
    ids = ids_of(3, 9)
    together = logits_of(model, ids)
    alone = torch.cat([logits_of(model, ids[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [20, 20], [1, 39], [39, 1], [7, 1, 1, 24, 7]], ids=str)
def test_cached_reading_equals_reading_at_once(pieces):
    model = make()
    ids = ids_of(2, 40)
    cache = KVCache()
    steps = [logits_of(model, piece, cache) for piece in ids.split(pieces, dim=1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(steps, dim=1), logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_cache_grows_without_losing_what_it_holds():
    cache, generator = KVCache(), torch.Generator().manual_seed(0)
    everything = torch.randn(2, 300, 3, 4, generator=generator)
    for start in range(0, 300, 5):
        new = everything[:, start : start + 5]
        for layer in range(2):
            keys, values = cache.append(layer, new + layer, -new)
            assert torch.equal(keys, everything[:, : start + 5] + layer)
            assert torch.equal(values, -everything[:, : start + 5])
        cache.advance(5)


def test_a_sequence_may_be_as_long_as_the_positions_and_no_longer():
    model = make()
    longest = SMALL_MODEL.max_position_embeddings
    assert logits_of(model, ids_of(1, longest)).shape == (1, longest, SMALL_MODEL.vocab_size)
    with pytest.raises(ValueError, match="65 tokens is longer than max_position_embeddings, which is 64"):
        model(ids_of(1, longest + 1))
    cache = KVCache()
    logits_of(model, ids_of(1, longest), cache)
    with pytest.raises(ValueError, match="65 tokens"):
        model(ids_of(1, 1), cache=cache)


def test_grouped_queries_equal_repeated_heads():
    grouped = make()
    repeated = make(dataclasses.replace(SMALL_MODEL, num_key_value_heads=6))
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = tensor.unflatten(0, (2, SMALL_MODEL.head_size))
            weights[name] = heads.repeat_interleave(3, dim=0).flatten(0, 1)
    repeated.load_state_dict(weights)
    ids = ids_of(2, 12)
    torch.testing.assert_close(logits_of(grouped, ids), logits_of(repeated, ids), rtol=1e-5, atol=1e-5)


def test_rotation_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, SMALL_MODEL.head_size, generator=generator)

    def score(at, other):
        here, there = (rotary_tables(p, p + 1, SMALL_MODEL, torch.device("cpu")) for p in (at, other))
        return (rotate(query, *here) * rotate(key, *there)).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(9, 4), score(9, 5))


def test_dropout_works_in_training_only():
    model = make(dataclasses.replace(SMALL_MODEL, dropout=0.3))
    ids = ids_of(1, 12)
    assert torch.equal(logits_of(model, ids), logits_of(make(), ids))
    model.train()
    torch.manual_seed(0)
    first, second = logits_of(model, ids), logits_of(model, ids)
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, logits_of(model, ids))


def test_bf16_is_near_float32():
    model = make(spread=2.0)
    ids = ids_of(2, 20)
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids)
        assert hidden.dtype == torch.bfloat16
        autocast = model.logits(hidden).float()
    whole = logits_of(make(spread=2.0).bfloat16(), ids)
    assert whole.dtype == torch.bfloat16
    for near in (autocast, whole.float()):
        assert not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, rtol=0.05, atol=0.03)


def test_every_parameter_gets_a_gradient():
    model = make(dataclasses.replace(SMALL_MODEL, tie_word_embeddings=False))
    model.logits(model(ids_of(2, 9))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# Names and sizes


def layer_names(number, qk_norm):
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["self_attn.q_norm", "self_attn.k_norm"] * qk_norm
    names += ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return {f"model.layers.{number}.{name}.weight" for name in names}


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_minimind_names(qk_norm, tied):
    config = dataclasses.replace(SMALL_MODEL, qk_norm=qk_norm, tie_word_embeddings=tied)
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    expected |= layer_names(0, qk_norm) | layer_names(1, qk_norm)
    expected |= set() if tied else {"lm_head.weight"}
    model = MiniMind(config)
    assert set(model.state_dict()) == expected
    assert {name for name, _ in model.named_parameters()} == expected


def test_tied_weights_are_one():
    tied, untied = (
        MiniMind(SMALL_MODEL),
        MiniMind(dataclasses.replace(SMALL_MODEL, tie_word_embeddings=False)),
    )
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert untied.head_weight is untied.lm_head.weight


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig(), 63_912_192),  # minimind-3, 64M
        (ModelConfig(hidden_size=512), 30_025_216),
        # minimind2-small, 26M, and minimind2, 104M: an MLP of 8/3 the width, rounded up to a multiple of 64
        (
            ModelConfig(hidden_size=512, num_key_value_heads=2, intermediate_size=1408, qk_norm=False),
            25_829_888,
        ),
        (
            ModelConfig(
                hidden_size=768,
                num_hidden_layers=16,
                num_key_value_heads=2,
                intermediate_size=2048,
                qk_norm=False,
            ),
            104_030_976,
        ),
    ],
    ids=["minimind-3", "512", "minimind2-small", "minimind2"],
)
def test_sizes_are_minimind_s(config, expected):
    hidden, mlp = config.hidden_size, config.mlp_size
    kv = config.num_key_value_heads * hidden // 8
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 2 * hidden
    layer += 2 * (hidden // 8) if config.qk_norm else 0
    with torch.device("meta"):
        model = MiniMind(config)
    by_formula = 6400 * hidden + config.num_hidden_layers * layer + hidden
    assert count_parameters(model) == by_formula == expected == config.num_parameters


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False}, {"tie_word_embeddings": False}, {"head_dim": 14}], ids=str
)
def test_a_model_s_size_is_known_before_it_is_made(options):
    config = dataclasses.replace(SMALL_MODEL, **options)
    assert config.num_parameters == count_parameters(MiniMind(config))


# Initialisation


def weights_of(seed, config=SMALL_MODEL):
    model = MiniMind(config)
    initialize(model, seed)
    return model.state_dict()


def test_a_seed_gives_the_weights_whatever_the_global_generator():
    torch.manual_seed(1)
    first = weights_of(7)
    torch.manual_seed(2)
    torch.rand(5)
    second = weights_of(7)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights_of(8)
    name = "model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])


def test_initialising_leaves_the_global_generator_alone():
    model = MiniMind(SMALL_MODEL)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initialize(model, 7)
    assert torch.equal(torch.rand(3), expected)


def test_matrices_are_normal_with_deviation_0_02_and_norms_are_ones():
    for name, tensor in weights_of(
        0, dataclasses.replace(SMALL_MODEL, hidden_size=192, vocab_size=600, tie_word_embeddings=False)
    ).items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        else:
            scaled = tensor / 0.02 * tensor.numel() ** 0.5
            assert abs(scaled.mean()) < 4, name
            assert abs(tensor.std() / 0.02 - 1) < 4 / (2 * tensor.numel()) ** 0.5, name
            assert tensor.abs().max() > 0.06, name


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` must be from 1 to 1048576, not 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": 10**400}, "`hidden_size` must be"),
        ({"num_hidden_layers": 10**18}, "`num_hidden_layers` must be from 1 to 4096"),
        ({"max_position_embeddings": 10**18}, "`max_position_embeddings` must be"),
        ({"hidden_size": 100}, "`hidden_size` 100 does not divide into 8 attention heads"),
        ({"hidden_size": 24}, "`head_dim` must be even for the rotary positions, not 3"),
        ({"head_dim": 5}, "`head_dim` must be even"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` 8 must be a multiple of `num_key_value_heads` 3"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_defaults_are_resolved():
    config = ModelConfig(hidden_size=512)
    assert (config.head_size, config.mlp_size) == (64, 1664)
    resolved = config.resolved()
    assert (resolved.head_dim, resolved.intermediate_size) == (64, 1664)
    assert resolved.resolved() == resolved
    free = ModelConfig(hidden_size=100, head_dim=32, intermediate_size=7)
    assert (free.head_size, free.mlp_size) == (32, 7)
    assert Attention(free).q_proj.weight.shape == (256, 100)
