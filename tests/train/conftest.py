"""What the tests of training share: one thread, a small dataset with a tokenizer of single bytes, what a run has written."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import InputEntry, Manifest, ShardEntry, TokenizerInfo
from minimind_data.dataset.writer import ShardWriter
from minimind_data.options import build
from minimind_train.model.config import ModelConfig
from minimind_train.run.phases import PretrainConfig, pretrain
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.metrics import FILE_NAME
from minimind_train.run_folder.record import RunRecord

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SHARDS = (30, 34)


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def make_dataset(folder: Path, seed: int = 0) -> Path:
    """Write 64 documents of 6 to 60 tokens in two shards; another seed, another dataset."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    data = (folder / "tokenizer.json").read_bytes()
    info = TokenizerInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=tokenizer.get_vocab_size(),
        bos_id=1,
        eos_id=2,
        pad_id=0,
    )
    entries = []
    for number, num_documents in enumerate(_SHARDS):
        name = f"text-{number:05d}"
        with ShardWriter(folder, name, "uint16") as writer:
            for _ in range(num_documents):
                text = "".join(generator.choice(list("北京abc ,.\n"), generator.integers(4, 30)))
                ids = [1, *tokenizer.encode(text, add_special_tokens=False).ids, 2]
                writer.append(np.array(ids, np.uint16), np.array([len(ids)]))
            written = writer.commit()
        source = {"input": 0, "input_start": number, "input_stop": number + 1, "input_sha256": ""}
        entries.append(ShardEntry(name=name, **source, **asdict(written)))
    manifest = Manifest(
        kind="pretrain",
        dtype="uint16",
        tokenizer=info,
        options={"field": "text"},
        inputs=(InputEntry(path="text.jsonl", bytes=2, sha256=f"{seed:064d}"),),
        shards=tuple(entries),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def retokenized(folder: Path) -> Path:
    """Write the dataset of `make_dataset` with a tokenizer of the same entries in another file, so another tokenizer."""
    make_dataset(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=2))
    manifest = Manifest.read(folder)
    info = replace(manifest.tokenizer, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (folder / "manifest.json").write_text(replace(manifest, tokenizer=info).to_json(), encoding="utf-8")
    return folder


def weights(run: Path, step: int) -> bytes:
    """The weights of a checkpoint, byte for byte."""
    return (checkpoint.folder_of(run, step) / checkpoint.MODEL_NAME).read_bytes()


def records(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics, but for what no two runs share."""
    return [{**record, "tokens_per_second": 0} for record in records(run / FILE_NAME)]


def steps(run: Path) -> list[int]:
    """The steps that metrics.jsonl has lines of."""
    return [record["step"] for record in metrics(run)]


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread of torch in a test, which keeps sums in one order; the former number after it."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset with two shards, text-00000 and text-00001; read only."""
    return make_dataset(tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another dataset with the same tokenizer."""
    return make_dataset(tmp_path_factory.mktemp("dataset") / "other", seed=1)


OPTIONS = {
    "seq_len": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "global_batch": 8,
    "micro_batch": 4,
    "steps": 12,
    "threads": 1,
    "save_every": 3,
    "log_every": 1,
    "dtype": "fp32",
    "device": "cpu",
}


SMALL_MODEL = ModelConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    vocab_size=53,
    max_position_embeddings=64,
)
"""A model of two layers whose sizes are all different, so that none can be taken for another."""


def config_of(run, dataset, **changes):
    return build(PretrainConfig, {**OPTIONS, "run": run, "shards": dataset, **changes})


class Said(list):
    """Takes what a run says."""

    __call__ = list.append

    @property
    def text(self):
        return "\n".join(self)


@pytest.fixture
def begin(tmp_path, small_dataset):
    """Begin a run in the folder tmp_path/run."""

    def begin(**changes):
        said = Said()
        outcome = pretrain(config_of(tmp_path / "run", small_dataset, **changes), said)
        return outcome, said

    return begin


def run_maker(tmp_path_factory, dataset, **defaults):
    """What makes runs by their options, and makes each once."""
    made = {}

    def make(**options):
        key = json.dumps(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            pretrain(config_of(made[key], dataset, **(defaults | options)), Said())
        return made[key]

    return make


def stop_after(run, step):
    """Take a finished run back to what it was after a checkpoint, but for its metrics, which a crash leaves ahead."""
    for later in checkpoint.steps_of(run):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(run, later))
    replace(RunRecord.read(run), finished=None).write(run)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, small_dataset):
    """A run that was never stopped, all of whose checkpoints were kept; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config_of(run, small_dataset, keep=0, dropout=0.1), Said())
    return run


@pytest.fixture
def stopped_run(tmp_path, whole_run):
    """The whole run as it was after step 6, its metrics some steps ahead."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    stop_after(run, 6)
    return run


def make_chats(folder, kind, count=40, seed=0):
    """Tokenize conversations (`sft`) or pairs (`dpo`) of short sums with the tokenizer that ships with the package."""
    generator = np.random.default_rng(seed)
    lines = []
    for one, other in generator.integers(1, 50, (count, 2)).tolist():
        asked = [{"role": "user", "content": f"{one} + {other}?"}]
        right, wrong = (
            [*asked, {"role": "assistant", "content": text}]
            for text in (f"That is {one + other}.", f"I do not know what {one} is.")
        )
        again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        lines.append(
            {"conversations": right + again} if kind == "sft" else {"chosen": right, "rejected": wrong}
        )
    folder.mkdir(parents=True)
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize([source], TokenizeOptions(out=folder / "data", kind=kind, workers=1))
    return folder / "data"


@pytest.fixture(scope="session")
def sft_dataset(tmp_path_factory):
    """The folder of a dataset of 40 conversations of two turns; a packing plan may be written into it."""
    return make_chats(tmp_path_factory.mktemp("sft") / "chats", "sft")


@pytest.fixture(scope="session")
def dpo_dataset(tmp_path_factory):
    """The folder of a dataset of 40 pairs of the same tokenizer; log-probabilities may be written into it."""
    return make_chats(tmp_path_factory.mktemp("dpo") / "chats", "dpo")


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory):
    """A run of three steps on text of the same tokenizer, to begin from; read only."""
    folder = tmp_path_factory.mktemp("chat-base")
    (folder / "text.txt").write_text("That is what 4 + 4 is. Yes. I do not know.\n" * 40)
    tokenize([folder / "text.txt"], TokenizeOptions(out=folder / "data", workers=1))
    pretrain(config_of(folder / "run", folder / "data", steps=3, learning_rate=3e-3), Said())
    return folder / "run"
