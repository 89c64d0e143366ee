"""Generation chooses as its options say, reads each token once, and streams the same text that decoding gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimind_data.errors import UserError
from minimind_train.generation.options import GenerateOptions
from minimind_train.generation.sampling import candidates, choose, generate, stream_text
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import KVCache, MiniMind, initialize

CONFIG = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=32,
    dropout=0.2,
)
EOS = 2


@pytest.fixture(scope="module")
def model():
    made = MiniMind(CONFIG)
    initialize(made, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else 20.0)
    return made.eval()


def ids_from(model, prompt=(1, 7, 9), *, eos_id=None, **options):
    return list(generate(model, list(prompt), options=GenerateOptions(**options), eos_id=eos_id))


def greedy_without_cache(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


# Generating


def test_temperature_zero_takes_the_likeliest_of_the_uncached_model(model):
    expected = greedy_without_cache(model, (1, 7, 9), 20)
    assert len(set(expected)) > 3
    for seed in (0, 1):
        assert ids_from(model, temperature=0.0, max_new_tokens=20, seed=seed) == expected


def test_top_k_of_one_is_greedy(model):
    assert ids_from(model, top_k=1, max_new_tokens=20) == ids_from(model, temperature=0.0, max_new_tokens=20)


def test_a_seed_reproduces_and_another_differs(model):
    first = ids_from(model, max_new_tokens=25, seed=5, temperature=1.5)
    torch.manual_seed(123)
    assert ids_from(model, max_new_tokens=25, seed=5, temperature=1.5) == first
    assert ids_from(model, max_new_tokens=25, seed=6, temperature=1.5) != first


def test_it_stops_before_eos(model):
    endless = ids_from(model, temperature=0.0, max_new_tokens=20)
    eos = endless[6]
    assert ids_from(model, temperature=0.0, max_new_tokens=20, eos_id=eos) == endless[: endless.index(eos)]


def test_it_stops_where_the_positions_end(model):
    assert len(ids_from(model, max_new_tokens=1000)) == 32 - 3 + 1
    assert len(ids_from(model, [1] * 32, max_new_tokens=1000)) == 1


def test_ids_come_as_they_are_made(model, monkeypatch):
    passes = []
    monkeypatch.setattr(
        KVCache, "advance", lambda self, n: (passes.append(n), setattr(self, "length", self.length + n))
    )
    ids = generate(model, [1, 7, 9], options=GenerateOptions(), eos_id=None)
    assert passes == []
    next(ids)
    assert passes == [3]
    next(ids)
    assert passes == [3, 1]


def test_dropout_is_off_and_the_model_keeps_its_mode(model):
    expected = ids_from(model, max_new_tokens=10)
    model.train()
    try:
        assert ids_from(model, max_new_tokens=10) == expected
        assert model.training
        assert model.model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([1] * 33, "has 33 tokens and the model reads at most 32; shorten the prompt"),
        ([1, 50], "token 50 but the model's vocabulary has 50 entries"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused_at_once(model, prompt, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, options=GenerateOptions(), eos_id=EOS)


def test_weights_that_are_no_numbers_are_a_sentence():
    broken = MiniMind(CONFIG).eval()
    initialize(broken, 0)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="give no numbers any more.*earlier `checkpoint`"):
            ids_from(broken, temperature=temperature)


# Choosing


def brute_force(logits, options):
    """Chances by id, straight from the definitions, in float64."""
    scaled = [(score - max(logits.tolist())) / options.temperature for score in logits.tolist()]
    chances = [math.exp(score) for score in scaled]
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if options.top_k:
        ranked = ranked[: options.top_k]
    total = sum(chances[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        kept.append(i)
        reached += chances[i] / total
        if options.top_p < 1 and reached > options.top_p:
            break
    total = sum(chances[i] for i in kept)
    return {i: chances[i] / total for i in kept}


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 0.85, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.0123, 0.3217, 0.5432, 0.8519, 0.9871, 1.0]),
)
@settings(max_examples=300, deadline=None)
def test_candidates_are_those_of_the_definitions(logits, temperature, top_k, top_p):
    options = GenerateOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = brute_force(torch.tensor(logits), options)
    ids, probabilities = candidates(torch.tensor(logits), options)
    assert ids.tolist() == list(expected)
    assert probabilities.tolist() == pytest.approx(list(expected.values()))


def test_the_token_that_crosses_top_p_stays():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    kept = {
        p: len(candidates(logits, GenerateOptions(temperature=1.0, top_p=p))[0])
        for p in (0.39, 0.41, 0.69, 0.71)
    }
    assert kept == {0.39: 1, 0.41: 2, 0.69: 2, 0.71: 3}


def test_choices_fall_as_often_as_their_chances():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    options = GenerateOptions(temperature=1.3, top_k=4, top_p=0.95)
    ids, chances = candidates(logits, options)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, options, generator) for _ in range(4000)])
    counts = torch.stack([(drawn == i).sum() for i in ids])
    assert counts.sum() == 4000
    deviations = (counts - 4000 * chances) / (4000 * chances * (1 - chances)).sqrt()
    assert deviations.abs().max() < 4


def test_a_tiny_temperature_is_greedy():
    options = GenerateOptions(temperature=1e-300, top_p=1.0, top_k=0)
    ids, probabilities = candidates(torch.tensor([1.0, 1.5, -3.0]), options)
    assert ids[0] == 1
    assert probabilities.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerateOptions(**options)


# Streaming


def byte_tokenizer():
    """A token for every byte, a few for runs of bytes that end inside a character, a special one and an added one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbol = {bytes([byte]): char for byte, char in _bytes_of(alphabet).items()}

    def token(data):
        return "".join(symbol[bytes([byte])] for byte in data)

    runs = ["，世".encode()[:4], "🙂".encode()[1:3], "é".encode(), b"ab", "\ufffd".encode()]
    vocab = {char: i for i, char in enumerate(alphabet)}
    vocab |= {token(run): 256 + i for i, run in enumerate(runs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<工具>"])
    return tokenizer


def _bytes_of(alphabet):
    """The symbol of each byte: the character of that number where it is printable, else one from 256 up, in order."""
    own = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted(char for char in alphabet if ord(char) >= 256)
    free = sorted(set(range(256)) - set(own.values()))
    return {byte: char for char, byte in own.items()} | dict(zip(free, others, strict=True))


TOKENIZER = byte_tokenizer()


def ids_of_bytes(data):
    symbols = _bytes_of(sorted(pre_tokenizers.ByteLevel.alphabet()))
    return [TOKENIZER.token_to_id(symbols[byte]) for byte in data]


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
@settings(max_examples=300, deadline=None)
def test_streamed_text_is_the_decoded_text(ids):
    assert "".join(stream_text(TOKENIZER, iter(ids))) == TOKENIZER.decode(ids)


@given(st.text(max_size=20), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_streamed_text_of_bytes_is_the_text(text, cut):
    data = text.encode("utf-8")
    data = data[: len(data) - cut]
    assert "".join(stream_text(TOKENIZER, iter(ids_of_bytes(data)))) == data.decode("utf-8", errors="replace")


def test_a_character_comes_when_it_is_whole():
    taken = []
    ids = (taken.append(i) or i for i in ids_of_bytes("a，🙂b".encode()))
    seen = [(len(taken), piece) for piece in stream_text(TOKENIZER, ids)]
    assert seen == [(1, "a"), (4, "，"), (8, "🙂"), (9, "b")]


def test_special_tokens_make_no_text():
    end = TOKENIZER.token_to_id("<|end|>")
    assert list(stream_text(TOKENIZER, iter([end, *ids_of_bytes(b"hi"), end]))) == ["h", "i"]
    half = "世".encode()
    split = [*ids_of_bytes(half[:2]), end, *ids_of_bytes(half[2:])]
    assert list(stream_text(TOKENIZER, iter(split))) == ["世"]


def test_bytes_that_make_no_character_come_out_at_the_end():
    assert list(stream_text(TOKENIZER, iter(ids_of_bytes("好".encode()[:2])))) == ["\ufffd"]
    assert list(stream_text(TOKENIZER, iter([]))) == []
