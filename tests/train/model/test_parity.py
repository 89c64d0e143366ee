"""Our loss follows MiniMind's, step by step, from the same weights over the same samples in the same order.

What it is held against is its published step, written down here from its formulas in plain operations and float64, with nothing of
ours in it but the weights to begin with, the documents and their order.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import options_from
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.order.sample_order import SampleOrder
from minimind_train.run import entry
from tests.helpers.runs import Said, config_of, metrics

BOS, EOS, PAD = 1, 2, 0
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}
MIXTURE = {
    "use_moe": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "seq_aux": False,
    "router_aux_loss_coef": 0.1,
}
STEPS, GLOBAL_BATCH, SEED, PEAK = 16, 8, 7, 5e-4


def rms_norm(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, angles):
    """Turn [B, heads, L, D] by the angles [L, D/2], which hold for both halves of a head."""
    angles = torch.cat((angles, angles), -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def attention(x, w, name):
    batch, length, hidden = x.shape
    size = hidden // 4

    def heads(which):
        return (x @ w[f"{name}.{which}_proj.weight"].T).view(batch, length, -1, size).transpose(1, 2)

    q, k, v = heads("q"), heads("k"), heads("v")
    q, k = rms_norm(q, w[f"{name}.q_norm.weight"]), rms_norm(k, w[f"{name}.k_norm.weight"])
    frequencies = 1e6 ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.arange(length).double()[:, None] * frequencies
    q, k = turned(q, angles), turned(k, angles)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
    return mixed @ w[f"{name}.o_proj.weight"].T


def mlp(x, w, name):
    gate, up, down = (w[f"{name}.{which}_proj.weight"] for which in ("gate", "up", "down"))
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x, w, name):
    """Return what the two best of four experts make of each token, and how unevenly they were chosen.

    MiniMind sends the last token of a sample through its layers too, of which no loss is taken. We do not, and it is left out of the
    evenness here: the one thing in which it would be seen.
    """
    tokens = x.flatten(0, 1)
    scores = (tokens @ w[f"{name}.gate.weight"].T).softmax(-1)
    best, chosen = scores.topk(2, -1)
    best = best / (best.sum(-1, keepdim=True) + 1e-20)
    share = torch.zeros_like(scores).scatter(1, chosen, best)
    out = sum(share[:, [e]] * mlp(tokens, w, f"{name}.experts.{e}") for e in range(4))
    chosen, scores = (each.view(*x.shape[:2], -1)[:, :-1].flatten(0, 1) for each in (chosen, scores))
    load = functional.one_hot(chosen, 4).double().mean(0)  # [choices, experts]
    return out.view_as(x), (load * scores.mean(0)).sum() * 4 * 0.1


def losses(w, ids):
    """The mean over what follows each token, and the auxiliary loss of all layers."""
    x = w["model.embed_tokens.weight"][ids]
    auxiliary = torch.zeros((), dtype=torch.float64)
    for layer in range(2):
        name = f"model.layers.{layer}"
        x = x + attention(rms_norm(x, w[f"{name}.input_layernorm.weight"]), w, f"{name}.self_attn")
        normed = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"])
        if f"{name}.mlp.gate.weight" in w:
            out, uneven = experts(normed, w, f"{name}.mlp")
            x, auxiliary = x + out, auxiliary + uneven
        else:
            x = x + mlp(normed, w, f"{name}.mlp")
    logits = rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
    labels = ids.masked_fill(ids == PAD, -100)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss, auxiliary


def samples_of(folder, max_length, seed, count):
    """The samples at the first positions: BOS, the first tokens of a document, EOS, PAD up to the length."""
    shards = ShardSet.open(folder)
    documents = []
    for shard in shards:
        ends = np.cumsum(shard.lengths)
        tokens = np.asarray(shard.tokens).astype(np.int64)
        documents += [tokens[end - size : end] for end, size in zip(ends, shard.lengths, strict=True)]
    order = SampleOrder(num_windows=len(documents), seed=seed, kind="shuffled")
    rows = []
    for window in order.windows(np.arange(count)):
        text = documents[window][1:-1][: max_length - 2].tolist()
        rows.append([BOS, *text, EOS, *[PAD] * (max_length - 2 - len(text))])
    return torch.tensor(rows)


def minimind(w, samples, *, accumulation, weigh):
    """Train from the weights `w`: AdamW on the gradients that the micro-batches add up; return each step's losses.

    Args:
        weigh: how the mean of a micro-batch counts among those of its step; MiniMind lets all count alike.
    """
    w = {name: tensor.double().requires_grad_() for name, tensor in w.items()}
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in w.items()} for _ in range(2))
    micro_batches = samples.split(GLOBAL_BATCH // accumulation)
    told, gradients, means = [], dict.fromkeys(w, 0.0), []
    for number, ids in enumerate(micro_batches, 1):
        rate = PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * number / len(micro_batches))))
        mean, auxiliary = losses(w, ids)
        step = -(-number // accumulation)
        loss = (
            mean * weigh(ids, samples[(step - 1) * GLOBAL_BATCH : step * GLOBAL_BATCH])
            + auxiliary / accumulation
        )
        for name, gradient in zip(w, torch.autograd.grad(loss, list(w.values())), strict=True):
            gradients[name] = gradients[name] + gradient
        means.append((loss - auxiliary / accumulation).item() + 1j * auxiliary.item() / accumulation)
        if number % accumulation:
            continue
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        with torch.no_grad():
            for name, tensor in w.items():
                gradient = gradients[name] * min(1.0, 1.0 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                tensor.mul_(1 - rate * 0.01)
                size = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                tensor.sub_(rate * first[name] / (1 - 0.9**step) / size)
        told.append((sum(means).real, sum(means).imag, norm))
        gradients, means = dict.fromkeys(w, 0.0), []
    return np.array(told)


def alike(ids, _):
    """MiniMind's way: every micro-batch counts the same in its step, however much of it is padding."""
    return len(ids) / GLOBAL_BATCH


def by_targets(ids, step):
    """Ours: every target counts the same in its step."""
    return ((ids[:, 1:] != PAD).sum() / (step[:, 1:] != PAD).sum()).item()


def both(folder, run, *, max_length, accumulation, weigh=alike, shape=None):
    """Train by theirs and by ours, and return the losses, auxiliary losses and gradient norms of each step of both."""
    options = {**SHAPE, **(shape or {})}
    model = MiniMind(options_from(ModelConfig, options))
    initialize(model, SEED)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = samples_of(folder, max_length, SEED, STEPS * GLOBAL_BATCH)
    theirs = minimind(weights, samples, accumulation=accumulation, weigh=weigh)
    chosen = {name: value for name, value in options.items() if name != "vocab_size"} | {
        "layout": "pad",
        "seq_len": max_length - 1,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": GLOBAL_BATCH // accumulation,
        "steps": STEPS,
        "seed": SEED,
        "learning_rate": PEAK,
        "save_every": 0,
    }
    entry.begin(config_of(run, folder, **chosen), Said())
    ours = [(line["loss"], line.get("auxiliary_loss", 0.0), line["grad_norm"]) for line in metrics(run)]
    assert len(ours) == STEPS
    assert ours[-1][0] < ours[0][0] - 0.05, "something is learned"
    return theirs, np.array(ours)


def assert_follows(theirs, ours):
    np.testing.assert_allclose(ours[:, :2], theirs[:, :2], rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], rtol=1e-4)


@pytest.mark.parametrize("shape", [None, MIXTURE], ids=["dense", "mixture"])
def test_over_padded_samples_in_one_micro_batch_a_step(small_dataset, tmp_path, shape):
    assert_follows(*both(small_dataset, tmp_path / "run", max_length=25, accumulation=1, shape=shape))


def test_over_micro_batches_with_equally_many_targets(small_dataset, tmp_path):
    assert_follows(*both(small_dataset, tmp_path / "run", max_length=6, accumulation=2))


def test_over_other_micro_batches_but_for_how_they_are_weighed(small_dataset, tmp_path):
    """MiniMind takes the mean of the means of micro-batches, so a target counts more where there are few: ours all count alike."""
    theirs, ours = both(small_dataset, tmp_path / "a", max_length=25, accumulation=4)
    assert np.abs(ours[:, 0] - theirs[:, 0]).max() > 1e-3
    assert_follows(*both(small_dataset, tmp_path / "b", max_length=25, accumulation=4, weigh=by_targets))
