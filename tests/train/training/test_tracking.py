"""The real TensorBoard, Weights & Biases and SwanLab, offline: what a run shows them is read back from what they wrote."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from minimind_train.training.options import TrackOptions
from minimind_train.training.tracking import TRACKERS
from tests.helpers.runs import Said, config_of, metrics, records, stop_after

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pynvml.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(wandb|swanlab|tensorboard|pydantic|google)"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "offline",
    }.items():
        monkeypatch.setenv(name, value)


def journal(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log behind 7 bytes of heading, which both wandb and swanlab write."""
    data, place, whole = path.read_bytes(), 7, b""
    while len(data) - place >= 7:
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:  # the only piece, or the last one
            yield whole
            whole = b""


def tensorboard(run: Path, *_: object):
    """(step, name) → value, and the texts, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(run / "tracking" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    tags = events.Tags()
    scalars = [(event.step, name, event.value) for name in tags["scalars"] for event in events.Scalars(name)]
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for name in tags["tensors"]
        for event in events.Tensors(name)
    ]
    return scalars, texts, [None]


def wandb(run: Path, *_: object):
    from wandb.proto.wandb_internal_pb2 import Record

    scalars, texts, ids = [], [], []
    for path in sorted((run / "tracking" / "wandb").glob("offline-run-*/*.wandb")):
        for data in journal(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.append(record.run.run_id)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                value = json.loads(item.value_json)
                if isinstance(value, str):
                    texts.append((record.history.step.num, value))
                elif not name.startswith("_"):
                    scalars.append((record.history.step.num, name, value))
    return scalars, texts, ids


def swanlab(run: Path, *_: object):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    scalars, texts, ids = [], [], []
    for folder in sorted((run / "tracking" / "swanlab").glob("run-*")):
        for data in journal(next(folder.glob("*.swanlab"))):
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            ids += [record.start.id] if kind == "start" else []
            if kind == "scalar":
                scalars.append((record.scalar.step, record.scalar.key, record.scalar.value.number))
            if kind == "media":
                for item in record.media.value.items:
                    text = (folder / "media" / "text" / item.filename).read_text(encoding="utf-8")
                    texts.append((record.media.step, text))
    return scalars, texts, ids


READERS = {"tensorboard": tensorboard, "wandb": wandb, "swanlab": swanlab}


def expected(run):
    """What trackers should have: all numbers of metrics.jsonl."""
    return sorted(
        (record["step"], name, value)
        for record in records(run / "metrics.jsonl")
        for name, value in record.items()
        if name != "step"
    )


def rounded(scalars):
    return [(step, name, pytest.approx(value, rel=1e-6, abs=1e-12)) for step, name, value in sorted(scalars)]


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_every_number_once_also_after_a_resume(tmp_path, small_dataset, other_dataset, name):
    run = tmp_path / "run"
    options = {"track": (name,), "val_shards": str(other_dataset), "val_every": 4, "dropout": 0.1}
    looks = {"sample_every": 3, "sample_prompt": ("北京",), "sample_tokens": 5}
    said = Said()
    entry.begin(config_of(run, small_dataset, steps=12, **options, **looks), said)
    assert "`track`" not in said.text
    stop_after(run, 6)  # as after a kill: metrics and trackers are ahead of the checkpoint
    before = metrics(run)
    said = Said()
    resume(run, {}, say=said)
    assert "`track`" not in said.text
    assert metrics(run) == before
    scalars, texts, ids = READERS[name](run)
    speed = {"tokens_per_second"}  # differs from time to time, and the others keep what they were sent first
    wanted = [item for item in expected(run) if item[1] not in speed]
    assert [item for item in sorted(scalars) if item[1] not in speed] == rounded(wanted)
    assert {item[1] for item in wanted} >= {"loss", "lr", "grad_norm", "val_loss", "epoch", "position"}
    assert [step for step, *_ in sorted(scalars) if step][:1] == [1]
    assert len(set(ids)) == 1
    written = dict(sorted(texts))
    assert sorted(step for step, _ in texts) == [3, 6, 9, 12]
    assert all(text.startswith("北京") for text in written.values())
    assert any(repr(written[12].removeprefix("北京")) in line for line in said)


def test_a_tracker_that_begins_at_a_resume_has_all_from_there_on(tmp_path, small_dataset):
    run = tmp_path / "run"
    entry.begin(config_of(run, small_dataset), Said())
    stop_after(run, 6)
    resume(run, {"track": ("wandb",)}, say=Said())
    scalars, _, _ = wandb(run)
    assert sorted({step for step, *_ in scalars}) == list(range(7, 13))


def test_what_a_tracker_does_ends_no_run(tmp_path, small_dataset, whole_run, monkeypatch):
    class Fragile:
        rewinds = False

        def __init__(self, run, run_id):
            self.calls = 0

        def log(self, step, values):
            self.calls += 1
            if self.calls > 2:
                raise ConnectionError("the network\nis gone")

        def close(self):
            raise AssertionError("it was left alone")

    def refuse(run, run_id):
        raise OSError("no space for it")

    monkeypatch.setitem(TRACKERS, "wandb", Fragile)
    monkeypatch.setitem(TRACKERS, "swanlab", refuse)
    run, said = tmp_path / "run", Said()
    entry.begin(config_of(run, small_dataset, track=("wandb", "swanlab"), dropout=0.1), said)
    told = [line for line in said if "`track`" in line]
    assert len(told) == 2
    assert told[0].startswith("`track` swanlab: no space for it; the run goes on without it")
    assert told[1].startswith("`track` wandb: the network is gone; the run goes on without it")
    assert metrics(run) == metrics(whole_run)


@pytest.mark.parametrize("name", READERS)
def test_a_package_that_is_missing_is_told_at_the_start(tmp_path, small_dataset, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    said = Said()
    outcome = entry.begin(config_of(tmp_path / "run", small_dataset, track=(name,), steps=2), said)
    assert outcome.step == 2
    (line,) = [line for line in said if "`track`" in line]
    assert f"`track` {name}: " in line
    assert f"is not installed; pip install 'minimind-pipeline[{name}]'" in line


def test_a_file_of_ids_that_is_broken_begins_anew(tmp_path, small_dataset, monkeypatch):
    given = []

    class Noting:
        rewinds = False

        def __init__(self, run, run_id):
            given.append(run_id)

        def log(self, step, values):
            pass

        def close(self):
            pass

    monkeypatch.setitem(TRACKERS, "wandb", Noting)
    run = tmp_path / "run"
    entry.begin(config_of(run, small_dataset, track=("wandb",)), Said())
    for damage in (None, "nonsense"):
        stop_after(run, 6)
        if damage:
            (run / "tracking" / "ids.json").write_text(damage)
        resume(run, {}, say=Said())
    assert given[0] == given[1] != given[2]


def test_excerpts_leave_no_trace_in_the_run(tmp_path, small_dataset, whole_run):
    run, said = tmp_path / "run", Said()
    config = config_of(
        run, small_dataset, keep=0, dropout=0.1, sample_every=5, sample_prompt=("a", "b"), sample_tokens=4
    )
    entry.begin(config, said)
    for step in checkpoint.steps_of(whole_run):
        ours, theirs = (checkpoint.folder_of(each, step) / "model.safetensors" for each in (run, whole_run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert metrics(run) == metrics(whole_run)
    looks = [line for line in said if " after '" in line]
    assert [line.partition(":")[0] for line in looks] == [
        "step 5  after 'a'", "step 5  after 'b'", "step 10  after 'a'", "step 10  after 'b'",
    ]  # fmt: skip


def test_the_same_tracker_twice_is_one():
    assert TrackOptions(track=("wandb", "wandb", "tensorboard")).track == ("wandb", "tensorboard")
