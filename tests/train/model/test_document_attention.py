"""The document mask: a document in a window is read as it would be alone, whatever stands beside it."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from minimind_train.model import document_attention
from minimind_train.model.document_attention import DocumentAttention, flash_kernel
from minimind_train.model.transformer import KVCache, MiniMind, initialize
from minimind_train.objectives.losses import summed_cross_entropy
from tests.helpers.runs import SMALL_MODEL

SEQ_LEN = 48
MODEL = dataclasses.replace(SMALL_MODEL, vocab_size=259, max_position_embeddings=SEQ_LEN)
TIGHT = {"rtol": 1e-4, "atol": 1e-5}


def make_model(**changes):
    """A model whose attention is sharp enough for a token out of place to show."""
    model = MiniMind(dataclasses.replace(MODEL, **changes))
    initialize(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, small_dataset):
    """A copy that a packing plan may be written into."""
    folder = tmp_path_factory.mktemp("documents") / "data"
    return ShardSet.open(shutil.copytree(small_dataset, folder))


def batch_of(dataset, layout, rows=slice(0, 6), documents_apart=True):
    """Tensors of some windows, and their documents as (row, first column, tokens)."""
    windows = open_windows(dataset, layout=layout, seq_len=SEQ_LEN, documents_apart=documents_apart)
    numbers = np.arange(len(windows))[rows]
    batch = {name: torch.from_numpy(array) for name, array in windows.fetch(numbers).items()}
    found = windows.segments(numbers)
    last = batch["targets"][:, -1:]
    tokens = torch.cat([batch["input_ids"], last.where(last != IGNORED, 0)], dim=1)
    spans = zip(found.rows.tolist(), found.columns.tolist(), found.lengths.tolist(), strict=True)
    return batch, [(row, column, tokens[row, column : column + length]) for row, column, length in spans]


def loss_and_gradients(model, micro_batches):
    """Summed over micro-batches of (input_ids, targets, position_ids or None)."""
    model.zero_grad()
    total = 0.0
    for input_ids, targets, position_ids in micro_batches:
        loss = summed_cross_entropy(model(input_ids, position_ids=position_ids), model.head_weight, targets)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(params=["mask", "one by one"])
def way(request, monkeypatch):
    """Both ways of the CPU, whatever the length of the window."""
    monkeypatch.setattr(document_attention, "_LONGEST_MASKED", SEQ_LEN if request.param == "mask" else 0)


MODELS = [{}, {"qk_norm": False}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}]


@pytest.mark.parametrize("change", MODELS, ids=str)
@pytest.mark.parametrize("layout", ["concat", "pack"])
@pytest.mark.usefixtures("way")
def test_a_document_in_a_window_is_read_as_it_would_be_alone(dataset, layout, change):
    model = make_model(**change)
    batch, found = batch_of(dataset, layout)
    assert len(found) > 12
    with torch.no_grad():
        masked = model.logits(model(batch["input_ids"], position_ids=batch["position_ids"]))
        unmasked = model.logits(model(batch["input_ids"]))
        for row, column, tokens in found:
            here = slice(column, min(column + len(tokens), SEQ_LEN))
            if here.start == SEQ_LEN:  # it begins where the inputs end
                continue
            alone = model.logits(model(tokens[None, : here.stop - here.start]))[0]
            torch.testing.assert_close(masked[row, here], alone, **TIGHT)
            if column:  # without the mask it reads what stands before it
                assert not torch.isclose(unmasked[row, here], alone, rtol=1e-2, atol=1e-2).all(-1).any()


@pytest.mark.parametrize("change", MODELS, ids=str)
@pytest.mark.parametrize("layout", ["concat", "pack"])
@pytest.mark.usefixtures("way")
def test_loss_and_gradients_are_the_sums_over_documents(dataset, layout, change):
    model = make_model(**change)
    batch, found = batch_of(dataset, layout)
    alone = [(tokens[None, :-1], tokens[None, 1:], None) for _, _, tokens in found if len(tokens) > 1]
    loss, gradients = loss_and_gradients(model, alone)
    masked = (batch["input_ids"], batch["targets"], batch["position_ids"])
    masked_loss, masked_gradients = loss_and_gradients(model, [masked])
    assert masked_loss == pytest.approx(loss, rel=1e-5)
    unmasked_loss, unmasked = loss_and_gradients(model, [(batch["input_ids"], batch["targets"], None)])
    assert unmasked_loss != pytest.approx(loss, rel=1e-4)
    for name, expected in gradients.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(masked_gradients[name], expected, rtol=1e-4, atol=1e-5 * scale)
        assert (unmasked[name] - expected).abs().max() > 1e-2 * scale, name


@pytest.mark.usefixtures("way")
def test_a_document_that_a_window_cuts_begins_again_there(dataset):
    """In concat the rest of a document is read as a document of its own: from position 0, without what went before."""
    batch, _ = batch_of(dataset, "concat")
    stream = torch.from_numpy(np.concatenate([shard.tokens for shard in dataset]).astype(np.int64))
    row = next(
        row for row in range(1, 6) if batch["input_ids"][row, 0] != 1 and batch["position_ids"][row, 5] == 5
    )
    begin = row * SEQ_LEN
    first = next(place for place in range(begin, -1, -1) if stream[place] == 1)
    assert 5 < begin + 6 - first < SEQ_LEN
    model = make_model()
    with torch.no_grad():
        masked = model(batch["input_ids"], position_ids=batch["position_ids"])[row, :6]
        torch.testing.assert_close(masked, model(stream[None, begin : begin + 6])[0], **TIGHT)
        whole = model(stream[None, first : begin + 6])[0, -6:]
        assert not torch.isclose(masked, whole, rtol=1e-2, atol=1e-2).all(-1).any()


def test_positions_begin_again_with_each_document(dataset, monkeypatch):
    """Seen in the keys: rotary scores depend on distances alone, so logits would not show it but in their last digits."""
    seen = []
    attend = DocumentAttention.attend
    monkeypatch.setattr(
        DocumentAttention, "attend", lambda self, *qkv: (seen.append(qkv[1].detach()), attend(self, *qkv))[1]
    )
    batch, found = batch_of(dataset, "pack", slice(0, 2))
    model = make_model()
    model(batch["input_ids"], position_ids=batch["position_ids"])
    in_window = seen[0]
    for row, column, tokens in found:
        here = tokens[None, : SEQ_LEN - column]
        seen.clear()
        model(here, position_ids=torch.arange(here.shape[1])[None])
        torch.testing.assert_close(in_window[row, column : column + here.shape[1]], seen[0][0], **TIGHT)


@pytest.mark.usefixtures("way")
def test_in_layout_pad_the_mask_changes_nothing(dataset):
    masked, _ = batch_of(dataset, "pad", slice(0, 30))
    plain, _ = batch_of(dataset, "pad", slice(0, 30), documents_apart=False)
    for name in ("input_ids", "targets"):
        assert torch.equal(masked[name], plain[name])
    assert (masked["input_ids"] == 0).any()
    model = make_model()
    parts = masked["input_ids"], masked["targets"]
    loss, gradients = loss_and_gradients(model, [(*parts, masked["position_ids"])])
    plain_loss, plain_gradients = loss_and_gradients(model, [(*parts, None)])
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, expected in plain_gradients.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5 * scale)


def test_a_cache_is_of_one_document():
    with pytest.raises(ValueError, match="leave position_ids out"):
        make_model()(torch.ones(1, 4, dtype=torch.int64), position_ids=torch.arange(4)[None], cache=KVCache())


def test_windows_are_never_joined():
    """Also where the positions of a window do not begin at 0."""
    found = DocumentAttention(torch.tensor([[0, 1, 0, 1], [2, 3, 0, 0]]))
    assert found.lengths == [2, 2, 2, 1, 1]
    assert found.starts.tolist() == [0, 2, 4, 6, 7, 8]


def inputs_of(lengths, rows, heads=4, groups=2, size=8):
    """Positions of the same documents in each row, and random queries, keys and values that take gradients."""
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(*positions.shape, count, size, generator=generator, requires_grad=True)
        for count in (heads, groups, groups)
    ]
    return positions, tensors


def with_gradients(attend, tensors):
    mixed = attend(*tensors)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    return mixed, *torch.autograd.grad((mixed * weights).sum(), tensors)


def flash_by_hand(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """What `varlen_attn` is called with, checked and done one document at a time."""
    assert cu_q.dtype == torch.int32
    assert cu_q.tolist() == cu_k.tolist()
    assert max_q == max_k >= max(cu_q.diff())
    assert (cu_q[0], cu_q[-1]) == (0, len(query))
    assert window_size == (-1, 0)
    assert query.shape[1] == key.shape[1] or enable_gqa
    group = query.shape[1] // key.shape[1]
    parts = []
    for start, stop in itertools.pairwise(cu_q.tolist()):
        q, k, v = query[start:stop], key[start:stop], value[start:stop]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_all_ways_give_the_same(lengths, rows, groups):
    positions, tensors = inputs_of(lengths, rows, groups=groups)
    attention, results = DocumentAttention(positions), []
    for longest_masked, kernel in ((10**6, flash_by_hand), (10**6, None), (0, None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(document_attention, "_LONGEST_MASKED", longest_masked)
            patch.setattr(document_attention, "flash_kernel", lambda _, kernel=kernel: kernel)
            results.append(with_gradients(attention.attend, tensors))
    for ours in results[1:]:
        for one, reference in zip(ours, results[0], strict=True):
            torch.testing.assert_close(one, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_dropout_drops_and_a_seed_repeats_it():
    positions, tensors = inputs_of([9, 7], 2)
    found = DocumentAttention(positions)

    def dropped(seed):
        torch.manual_seed(seed)
        return found.attend(*tensors, dropout_p=0.5)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    assert not torch.equal(dropped(1), found.attend(*tensors))


@pytest.mark.usefixtures("way")
def test_under_autocast_it_is_near():
    model = make_model()
    ids = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(13), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        exact = model(ids, position_ids=positions)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(ids, position_ids=positions)
    assert 0 < (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_long_windows_are_read_one_document_at_a_time():
    for length, masked in [(340, True), (512, True), (513, False)]:
        positions, tensors = inputs_of([length - 5, 5], 1)
        found = DocumentAttention(positions)
        found.attend(*tensors)
        assert ("mask" in vars(found)) is masked


def test_the_flash_kernel_is_for_cuda_in_half_precision():
    assert flash_kernel(torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)) is None


def test_of_torch_only_the_kernel_with_groups_of_heads_is_used(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", exc_type=ImportError)
    for kernel, known in [
        (lambda query, *, window_size=(-1, -1), enable_gqa=False: query, True),
        (lambda query, is_causal=False: query, False),  # as in the first torch that had one
    ]:
        document_attention._VARLEN.clear()
        with monkeypatch.context() as patch:
            patch.setattr(varlen, "varlen_attn", kernel)
            assert (document_attention._varlen_attention() is kernel) is known
    document_attention._VARLEN.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [2, 4])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(dtype, groups):
    positions, tensors = inputs_of([37, 1, 90, 128], 3, groups=groups, size=64)
    expected = with_gradients(DocumentAttention(positions).attend, tensors)
    there = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in tensors]
    found = DocumentAttention(positions.cuda())
    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    mixed = found.attend(*there)
    ours = (mixed, *torch.autograd.grad((mixed * weights).sum(), there))
    if dtype == torch.bfloat16 and document_attention._varlen_attention() and flash_kernel(there[0]):
        assert "mask" not in vars(found)  # the kernel was taken
    for here, reference in zip(ours, expected, strict=True):
        error = (here.float().cpu() - reference).abs().max() / reference.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_document_in_a_window_is_read_as_it_would_be_alone(dataset):
    batch, found = batch_of(dataset, "pack")
    model = make_model(head_dim=16).cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        inputs, positions = batch["input_ids"].cuda(), batch["position_ids"].cuda()
        masked = model(inputs, position_ids=positions).float()
        for row, column, tokens in found:
            stop = min(column + len(tokens), SEQ_LEN)
            alone = model(tokens[None, : stop - column].cuda()).float()[0]
            error = functional.mse_loss(masked[row, column:stop], alone) / alone.square().mean()
            assert error < 1e-2
