"""verify(): what it reads, and that it says so; the validation part and the packing plans are held against their checksums too."""

import hashlib
import json
import shutil
import zlib

import numpy as np
import pytest

from minimind_data.dataset.format import FormatError, Manifest
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.files import write_checked
from minimind_data.windows.opening import open_windows
from minimind_data.windows.pack import PackWindows
from minimind_data.windows.pack_plan import PackPlan, open_plan
from tests.helpers.commands import mm_data
from tests.helpers.datasets import text_dataset


@pytest.fixture
def folder(tmp_path):
    """A dataset with a validation part, and a packing plan in each."""
    folder = text_dataset(tmp_path / "data")
    text_dataset(folder / "val", seed=1)
    for place in (folder, folder / "val"):
        open_plan(ShardSet.open(place), 33, "cut")
    return folder


def plan_of(folder):
    return next((folder / ".mm-pack").glob("*.v1"))


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_it_says_what_it_read(folder):
    verdict = verify(folder)
    assert not verdict.problems
    assert verdict.folders == (str(folder), str(folder / "val"))
    assert (verdict.files, verdict.plans) == (14, 2)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert verdict.bytes == size
    assert "its validation part and 2 packing plans included" in mm_data("verify", folder).output
    facts = json.loads(mm_data("verify", folder, "--json").stdout)
    assert facts["folders"] == [str(folder), str(folder / "val")]
    assert facts["plans"] == 2


def test_a_dataset_alone_is_said_to_be_intact_as_before(tmp_path):
    folder = text_dataset(tmp_path / "data")
    assert mm_data("verify", folder).output.endswith("all checksums match)\n")


@pytest.mark.parametrize("place", ["", "val"])
@pytest.mark.parametrize("name", ["text-00000.bin", "text-00001.idx", "tokenizer.json"])
def test_a_flipped_byte_of_either_part_is_found(folder, place, name):
    flip(folder / place / name)
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{folder / place / name}: SHA-256")


def test_a_damaged_manifest_of_the_validation_part_is_a_problem_of_the_dataset(folder):
    flip(folder / "val" / "manifest.json", 40)
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{folder / 'val' / 'manifest.json'}: edited or damaged")
    assert mm_data("verify", folder).exit_code == 1


@pytest.mark.parametrize("place", ["", "val"])
@pytest.mark.parametrize("at", [-1, 90, 12, 200])
def test_a_flipped_byte_of_a_plan_is_found_and_the_remedy_is_named(folder, place, at):
    flip(plan_of(folder / place), at)
    verdict = verify(folder)
    assert [problem.startswith(f"{plan_of(folder / place)}: ") for problem in verdict.problems] == [True]
    assert verdict.remedies == ("delete the packing plan: it is made again when it is needed",)


def test_stale_plans_are_not_looked_at(folder):
    plan = plan_of(folder)
    shutil.copy(plan, plan.with_name("0123456789abcdef-33-cut.v1"))
    assert verify(folder).plans == 2


def with_crc(content):
    """A plan's bytes with the CRC that they have."""
    blank = content[:12] + bytes(4) + content[16:]
    return content[:12] + zlib.crc32(blank).to_bytes(4, "little") + content[16:]


@pytest.mark.parametrize(
    ("at", "value", "clause"),
    [
        (128, 1, "not made of its segments"),
        (136, -1, "do not follow each other"),
        (-4, 2**30, "names a document that the dataset does not have"),
    ],
)
def test_a_plan_whose_checksum_fits_points_nowhere_else(folder, at, value, clause):
    path = plan_of(folder)
    content = bytearray(path.read_bytes())
    width = 8 if at > 0 else 4
    at %= len(content)
    content[at : at + width] = value.to_bytes(width, "little", signed=True)
    path.write_bytes(with_crc(bytes(content)))
    assert clause in verify(folder).problems[0]
    shards = ShardSet.open(folder)
    assert PackPlan.read(path, shards) is None
    assert open_plan(shards, 33, "cut").num_windows
    assert not verify(folder).problems


def test_a_plan_that_overfills_windows_is_refused_when_they_are_read(folder):
    path = plan_of(folder)
    content = bytearray(path.read_bytes())
    num_windows = int.from_bytes(content[80:88], "little")
    last = int.from_bytes(content[128 + 8 * num_windows :][:8], "little")
    content[136 : 128 + 8 * num_windows] = last.to_bytes(8, "little") * (num_windows - 1)
    path.write_bytes(with_crc(bytes(content)))
    shards = ShardSet.open(folder)
    windows = open_windows(shards, layout="pack", seq_len=32)
    assert isinstance(windows, PackWindows)
    with pytest.raises(FormatError, match=r"its plan of windows is of other documents; delete \.mm-pack"):
        windows.fetch(np.arange(len(windows)))


def test_a_token_outside_of_the_vocabulary_is_found_though_all_checksums_fit(folder):
    path = folder / "text-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[5] = 259
    tokens.tofile(path)
    text = (folder / "manifest.json").read_text()
    manifest = Manifest.read(folder)
    old = manifest.shards[0].written.sha256
    content = json.loads(text.replace(old, hashlib.sha256(path.read_bytes()).hexdigest()))
    del content["checksum"]
    write_checked(folder / "manifest.json", content, key="checksum")
    problems = verify(folder).problems
    assert any(
        "text-00000.bin: token 259 at offset 5 is outside of the vocabulary of 259" in one for one in problems
    )


def with_index(folder, change):
    """Change the index of the first shard, and make its checksum right again."""
    content = json.loads((folder / "manifest.json").read_bytes())
    path = folder / f"{content['shards'][0]['name']}.idx"
    index = bytearray(path.read_bytes())
    lengths = np.frombuffer(index, "<i4", content["shards"][0]["sequences"], 34)
    offsets = np.frombuffer(index, "<i8", len(lengths), 34 + 4 * len(lengths))
    starts = np.frombuffer(index, "<i8", offset=34 + 12 * len(lengths))
    change(lengths, offsets, starts)
    path.write_bytes(index)
    content["shards"][0]["index_sha256"] = hashlib.sha256(index).hexdigest()
    del content["checksum"]
    write_checked(folder / "manifest.json", content, key="checksum")
    return path


def longer(lengths, _offsets, _starts):
    lengths[0] += 2**30


def negative(lengths, _offsets, _starts):
    lengths[1] = -1


def overlapping(_lengths, offsets, _starts):
    offsets[2] -= 2


def shorter_last(lengths, _offsets, _starts):
    lengths[-1] -= 1


def no_first(_lengths, _offsets, starts):
    starts[0] = 1


def backwards(_lengths, _offsets, starts):
    starts[2] = 0


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (longer, "do not lie end to end"),
        (negative, "do not lie end to end"),
        (overlapping, "do not lie end to end"),
        (shorter_last, "bytes, and the shard"),
        (no_first, "documents are not made of its sequences"),
        (backwards, "documents are not made of its sequences"),
    ],
)
def test_an_index_that_contradicts_its_shard_is_damage_though_the_checksum_fits(tmp_path, change, clause):
    folder = text_dataset(tmp_path / "data")
    path = with_index(folder, change)
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{path}: ")
    assert clause in problem
    for arguments in (
        ["stats", folder],
        ["shuffle", folder, "--out", tmp_path / "new"],
        ["convert", folder, "--to", "parquet", "--out", tmp_path / "new"],
    ):
        result = mm_data(*arguments)
        assert result.exit_code == 1, result.output
        assert clause in result.output
        assert not (tmp_path / "new").exists()
