"""JSON files with their own checksum: what was written comes back, and whatever else is there is named."""

import errno
import json
import os
import pickle

import pytest

from minimind_data.errors import UserError
from minimind_data.files import (
    DamagedFileError,
    FolderLock,
    checked_json,
    fsync_folder,
    read_checked,
    write_atomic,
    write_checked,
)

CONTENT = {"format_version": 2, "text": "für 你", "list": [1, 2.5, None], "inner": {"a": True}}


@pytest.fixture
def path(tmp_path):
    write_checked(tmp_path / "x.json", CONTENT, key="sha256")
    return tmp_path / "x.json"


def test_what_was_written_comes_back(path):
    assert read_checked(path, key="sha256", version=2) == CONTENT
    text = path.read_text(encoding="utf-8")
    assert list(json.loads(text)) == [*CONTENT, "sha256"]
    assert "für 你" in text
    assert text.endswith("}\n")


def test_file_names_that_are_no_utf8_come_back(tmp_path):
    content = {"path": b"a\xff.jsonl".decode(errors="surrogateescape")}
    write_checked(tmp_path / "x.json", content, key="checksum")
    assert read_checked(tmp_path / "x.json", key="checksum") == content


def test_another_layout_is_the_same_content(path):
    path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True), encoding="utf-8")
    assert read_checked(path, key="sha256") == CONTENT


def test_every_changed_byte_shows(path):
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        if _is_same_json(path.read_bytes()):  # white space of another kind
            assert read_checked(path, key="sha256") == CONTENT
            continue
        with pytest.raises(DamagedFileError) as error:
            read_checked(path, key="sha256", remedy="mend it")
        assert str(error.value).startswith(f"{path}: edited or damaged (")
        assert error.value.remedy == "mend it"


def _is_same_json(data):
    try:
        return json.loads(data) == json.loads(checked_json(CONTENT, key="sha256"))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{}", b'"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"sha256": null}']
)
def test_whatever_else_is_there_is_damage(path, data):
    path.write_bytes(data)
    with pytest.raises(DamagedFileError):
        read_checked(path, key="sha256", version=2)


def test_a_folder_in_its_place_is_damage(path):
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedFileError, match="Is a directory"):
        read_checked(path, key="sha256")


def test_another_version_is_said_before_the_checksum(path):
    with pytest.raises(UserError, match="format version 2; this program reads version 3; use the program"):
        read_checked(path, key="of another name", version=3)


def test_a_file_that_is_missing_is_not_damaged(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        read_checked(tmp_path / "x.json", key="sha256")
    with pytest.raises(NotADirectoryError):
        read_checked(tmp_path / "file" / "x.json", key="sha256")


def test_a_file_that_may_not_be_read_is_not_damaged(path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(UserError, match="cannot be read .Permission denied.; make it readable") as error:
        read_checked(path, key="sha256")
    assert not isinstance(error.value, DamagedFileError)


def test_the_error_survives_pickling(path):
    path.write_bytes(b"{}")
    with pytest.raises(DamagedFileError) as error:
        read_checked(path, key="sha256", remedy="mend it")
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), vars(copy)) == (str(error.value), vars(error.value))
    assert copy.problem == "its checksum does not fit"


def test_a_lock_removes_no_file_of_anybodys(tmp_path):
    (tmp_path / "lock").write_text("somebody's")
    with pytest.raises(UserError, match="lock: a file with content"), FolderLock(tmp_path / "lock", "busy"):
        pass
    assert (tmp_path / "lock").read_text() == "somebody's"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be written"), FolderLock(tmp_path / "link", "busy"):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_that_cannot_be_removed_is_released(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, FolderLock(tmp_path / "lock", "busy"):
        patch.setattr("os.unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with FolderLock(tmp_path / "lock", "busy"):
        pass


def test_a_failure_to_flush_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error") as error:
        write_atomic(tmp_path / "x", "text")
    assert error.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError, match="Input/output error") as error:
        fsync_folder(tmp_path)
    assert error.value.filename == str(tmp_path)


def test_too_many_open_files_is_no_damage(path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("io.open", full)
    with pytest.raises(UserError, match=r"x.json: cannot be opened .*ulimit -n") as error:
        read_checked(path, key="sha256", remedy="delete it")
    assert not isinstance(error.value, DamagedFileError)
