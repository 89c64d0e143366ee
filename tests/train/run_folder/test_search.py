"""Which place is taken for that of a record, of several that could be: by fingerprint, most parts of the path first, the nearest folder."""

import os
import shutil

import pytest

from minimind_train.run_folder.places import relative_paths, validation_fingerprint, with_present_places
from minimind_train.run_folder.record import RunRecord
from tests.helpers.datasets import BOS, EOS, write_dataset
from tests.helpers.runs import Said


@pytest.fixture(autouse=True)
def cwd(tmp_path, monkeypatch):
    """The current folder, in which nothing is."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "home" / "project" / "runs" / "it"
    folder.mkdir(parents=True)
    return folder


def dataset(folder, source="text", tokenizer='{"a": "tokenizer"}'):
    return write_dataset(folder, [[[BOS, 5, EOS]]], source=source, tokenizer=tokenizer).manifest


def record_of(manifest, *, dataset=None, validation=None, relative=None, **options):
    return RunRecord(
        command="pretrain",
        options={"shards": "/gone/data/zh", "val_shards": None, "from_weight": None, **options},
        dataset=dataset or manifest.fingerprint,
        tokenizer=manifest.tokenizer,
        validation=validation,
        relative_paths=relative or {},
    )


def places(record, run, **names):
    said = Said()
    found = with_present_places(record, run, said, **names).options
    assert bool(said) is (found != record.options)
    return found


def test_paths_from_the_run_folder(tmp_path, run):
    (tmp_path / "link").symlink_to(run)
    options = {"shards": "/a/data", "val_shards": None, "from_weight": ""}
    assert relative_paths(options, tmp_path / "link") == {"/a/data": os.path.relpath("/a/data", run)}
    project = run.parents[1]
    options = {
        "shards": [f"a={project}/data/a:1", f"b={project}/data/b:2"],
        "val_shards": f"{project}/val",
        "from_weight": f"{run}/weights",
    }
    assert relative_paths(options, run) == {
        f"{project}/data/a": "../../data/a",
        f"{project}/data/b": "../../data/b",
        f"{project}/val": "../../val",
        f"{run}/weights": "weights",
    }


def test_the_fingerprint_of_a_validation_set(tmp_path):
    manifest = dataset(tmp_path / "val")
    assert validation_fingerprint({"val_shards": str(tmp_path / "val")}) == manifest.fingerprint
    assert validation_fingerprint({"val_shards": str(tmp_path / "none")}) is None
    assert validation_fingerprint({"val_shards": None}) is None


def test_the_last_part_alone_is_enough_where_the_fingerprint_is_known(tmp_path, run):
    manifest = dataset(tmp_path / "home" / "zh")
    assert places(record_of(manifest), run)["shards"] == str(tmp_path / "home" / "zh")
    other = record_of(manifest, dataset="f" * 64)
    assert places(other, run)["shards"] == "/gone/data/zh"


def test_more_parts_go_before_nearer_folders_and_these_before_others(tmp_path, run, cwd):
    near, far = run.parent / "zh", tmp_path / "home" / "data" / "zh"
    manifest = dataset(near)
    record = record_of(manifest)
    assert places(record, run)["shards"] == str(near)
    shutil.copytree(near, far)
    assert places(record, run)["shards"] == str(far)
    shutil.copytree(near, cwd / "data" / "zh")
    assert places(record, run)["shards"] == str(far), "the run's folders come before the current one"
    shutil.rmtree(far)
    assert places(record, run)["shards"] == str(cwd / "data" / "zh")
    shutil.copytree(near, run.parents[1] / "gone" / "data" / "zh")
    assert places(record, run)["shards"] == str(run.parents[1] / "gone" / "data" / "zh")


def test_the_folder_beside_the_run_goes_before_the_recorded_one(tmp_path, run):
    recorded, beside = tmp_path / "there" / "data", run.parents[1] / "data"
    manifest = dataset(recorded)
    record = record_of(manifest, shards=str(recorded), relative={str(recorded): "../../data"})
    assert places(record, run)["shards"] == str(recorded)
    shutil.copytree(recorded, beside)
    assert places(record, run)["shards"] == str(beside)
    shutil.rmtree(beside)
    dataset(beside, source="something else")
    assert places(record, run)["shards"] == str(recorded)


def test_where_another_dataset_has_taken_the_place_nothing_is_looked_for(tmp_path, run):
    recorded = tmp_path / "there" / "data"
    manifest = dataset(run.parent / "data")
    dataset(recorded, source="something else")
    record = record_of(manifest, shards=str(recorded))
    assert places(record, run)["shards"] == str(recorded)
    shutil.rmtree(recorded)
    assert places(record, run)["shards"] == str(run.parent / "data")


def test_parts_are_looked_for_each_by_its_own_fingerprint(tmp_path, run):
    one = dataset(run.parent / "en")
    other = dataset(run.parent / "zh", source="something else")
    shards = ["en=/gone/en:1", "zh=/gone/zh:1/3"]
    mixed = f"en={one.fingerprint} zh={other.fingerprint}"
    assert places(record_of(one, dataset=mixed, shards=shards), run)["shards"] == [
        f"en={run.parent}/en:1", f"zh={run.parent}/zh:1/3",
    ]  # fmt: skip
    exchanged = record_of(one, dataset=f"en={other.fingerprint} zh={one.fingerprint}", shards=shards)
    assert places(exchanged, run)["shards"] == shards
    fewer = record_of(one, dataset=f"en={one.fingerprint}", shards=shards)
    assert places(fewer, run)["shards"] == shards, "a record that contradicts itself is left alone"


def test_a_validation_set_without_a_fingerprint_needs_two_parts_and_the_tokenizer(tmp_path, run):
    manifest = dataset(run.parent / "val")
    record = record_of(manifest, dataset="f" * 64, val_shards="/gone/data/val")
    assert places(record, run)["val_shards"] == "/gone/data/val"
    dataset(run.parent / "data" / "val", source="something else")
    assert places(record, run)["val_shards"] == str(run.parent / "data" / "val")
    shutil.rmtree(run.parent / "data" / "val")
    dataset(run.parent / "data" / "val", tokenizer='{"another": "tokenizer"}')
    assert places(record, run)["val_shards"] == "/gone/data/val"
    known = record_of(
        manifest, dataset="f" * 64, val_shards="/gone/data/val", validation=manifest.fingerprint
    )
    assert places(known, run)["val_shards"] == str(run.parent / "val")


def test_weights_are_a_file_or_a_folder_with_a_config(tmp_path, run):
    manifest = dataset(tmp_path / "data")
    record = record_of(manifest, shards=str(tmp_path / "data"), from_weight="/gone/models/base")
    (run.parent / "base").touch()
    place = run.parent / "models" / "base"
    place.mkdir(parents=True)
    assert places(record, run)["from_weight"] == "/gone/models/base", "one part is not enough, nor a folder"
    (place / "config.json").touch()
    assert places(record, run)["from_weight"] == str(place)
    shutil.rmtree(place)
    place.touch()
    assert places(record, run)["from_weight"] == str(place)
    there = tmp_path / "weights"
    there.touch()
    record = record_of(
        manifest,
        shards=str(tmp_path / "data"),
        from_weight=str(there),
        relative={str(there): "../models/base"},
    )
    assert places(record, run)["from_weight"] == str(there), "what is where it was is not looked for"
    there.unlink()
    assert places(record, run)["from_weight"] == str(place)


def test_only_what_is_asked_for_is_looked_for(run):
    manifest = dataset(run.parent / "data" / "zh")
    record = record_of(
        manifest, validation=manifest.fingerprint, val_shards="/gone/data/zh", from_weight="/gone/data/zh"
    )
    found = places(record, run, names=["val_shards"])
    assert found == record.options | {"val_shards": str(run.parent / "data" / "zh")}
    found = places(record, run)
    assert found == record.options | dict.fromkeys(["shards", "val_shards"], str(run.parent / "data" / "zh"))
