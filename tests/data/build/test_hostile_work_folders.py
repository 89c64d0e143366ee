"""The files of an unfinished build can say anything: the build goes on, or one sentence says what to delete; no file of another is touched."""

import json
import shutil

import pytest

from minimind_data.build.pipeline import commit
from minimind_data.build.work_folder import WorkFolder
from minimind_data.errors import UserError
from tests.helpers.commands import mm_data
from tests.helpers.mutations import mutations, snapshot, write_with_checksum


@pytest.fixture
def work(tmp_path, write_jsonl, small_tokenizer):
    """The folder of a build of which one slice of two is made."""
    inputs = write_jsonl([f"w{3 + i % 40} w5" for i in range(200)])
    arguments = ["tokenize", inputs, "--tokenizer", small_tokenizer, "--out", tmp_path / "home" / "data"]
    arguments += ["--split-bytes", "1KiB", "--workers", "1"]
    result = mm_data(*arguments, "--task", "1/2")
    assert result.exit_code == 0, result.output
    return WorkFolder(tmp_path / "home" / "data"), arguments


def refusal_of(read):
    try:
        read()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("pattern", ["plan.json", "*.result.json"])
def test_every_value_is_taken_or_refused_in_one_sentence(work, pattern):
    folder, _ = work
    path = min(folder.path.glob(pattern))
    content = json.loads(path.read_bytes())
    del content["checksum"]
    name = path.name.removesuffix(".result.json")
    refused = 0
    for change, changed in mutations(content):
        write_with_checksum(path, changed, "checksum")
        sentence = refusal_of(folder.plan if pattern == "plan.json" else lambda: folder.read_result(name))
        assert sentence is None or ("\n" not in sentence and "delete" in sentence), change
        refused += sentence is not None
    assert refused > 200


@pytest.mark.parametrize("name", ["../victim", "/abs/victim", "..", "a\nb"])
def test_a_plan_deletes_nothing_outside_of_its_folder(work, name):
    folder, arguments = work
    path = folder.path / "plan.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    for suffix in (".bin", ".idx", ".mask"):
        (folder.out.parent / f"victim{suffix}").write_bytes(b"somebody's")
    for other in (name, str(folder.out.parent / "victim")):
        write_with_checksum(path, content | {"shards": [*content["shards"], other]}, "checksum")
        before = snapshot(folder.out.parent)
        result = mm_data(*arguments)
        assert result.exit_code == 1
        assert "plan.json: edited or damaged (shards[" in result.output
        assert snapshot(folder.out.parent) == before


def test_the_inputs_and_options_of_a_plan_are_what_a_plan_can_have_or_are_refused(work):
    folder, arguments = work
    assert mm_data(*arguments, "--task", "2/2").exit_code == 0
    path = folder.path / "plan.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    refused = 0
    for _, changed in mutations({name: content[name] for name in ("inputs", "options")}):
        write_with_checksum(path, content | changed, "checksum")
        copy = folder.out.parent / "copy"
        shutil.copytree(folder.out, copy)
        refused += refusal_of(lambda: commit(copy)) is not None  # noqa: B023 - called at once
        shutil.rmtree(copy)
    assert refused > 200


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("/dev/zero", "a pipe or a device"),
        ("/dev", "a folder, where a file is needed"),
        ("x" * 5000, "which is not there any more"),
    ],
)
def test_an_input_of_a_plan_that_is_no_file_is_not_read(work, location, complaint):
    folder, _ = work
    path = folder.path / "plan.json"
    content = json.loads(path.read_bytes())
    del content["checksum"]
    content["inputs"][0]["location"] = location
    write_with_checksum(path, content, "checksum")
    assert complaint in refusal_of(lambda: commit(folder.out))
