"""The page as a file: it parses, holds what it should, asks for nothing, and no text can become part of it."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.html import fill, read_template
from minimind_data.report import page as module
from minimind_data.report.page import check_page_place, write_page
from minimind_data.report.statistics import stats
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.windows.opening import open_windows
from tests.helpers.pages import Reader

HOSTILE = "</script><script>alert(1)</script><!--<script> \u2028 <img src=x onerror=alert(1)> & ]]>"
TEXTS = [HOSTILE, *(f"你好 {i}, 𠮷 é ".strip() * (i % 7 + 1) for i in range(60))]


@pytest.fixture
def dataset(tmp_path, write_jsonl):
    tokenize([write_jsonl(TEXTS)], TokenizeOptions(out=tmp_path / "d", workers=1, split_bytes=4096))
    return ShardSet.open(tmp_path / "d")


def write(dataset, path, seq_lens=(16, 40), **options):
    tokenizer = load_tokenizer(dataset.folder)
    told = stats(dataset, tokenizer, seq_lens).as_dict()
    assert write_page(path, told, dataset, tokenizer, **options) == path.stat().st_size
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    return told, reader


def test_the_page_holds_the_numbers_and_the_windows(dataset, tmp_path):
    told, reader = write(dataset, tmp_path / "page.html", num_windows=9)
    assert len(reader.scripts) == 2
    data = json.loads(reader.scripts[0])
    assert {name: data[name] for name in told} == told
    assert data["name"] == "d"
    assert [(view["layout"], view["seq_len"]) for view in data["views"]] == [
        ("concat", 16),
        ("pad", 16),
        ("pack", 16),
        ("concat", 40),
        ("pad", 40),
        ("pack", 40),
    ]
    for view in data["views"]:
        windows = open_windows(dataset, layout=view["layout"], seq_len=view["seq_len"])
        numbers = [window["number"] for window in view["windows"]]
        assert (len(numbers), numbers[0], numbers[-1]) == (9, 0, len(windows) - 1)
        assert view["of"] == len(windows)
        assert np.ptp(np.diff(numbers)) <= 1
        for window in view["windows"]:
            check_window(window, windows)


def check_window(window, windows):
    sample = {name: row[0].tolist() for name, row in windows.fetch(np.array([window["number"]])).items()}
    last = [] if sample["targets"][-1] == IGNORED else [sample["targets"][-1]]
    assert window["ids"] == sample["input_ids"] + last
    learned = [False, *(target != IGNORED for target in sample["targets"])][: len(window["ids"])]
    unlearned = {at for start, stop in window["unlearned"] for at in range(start, stop)}
    assert [at not in unlearned for at in range(len(learned))] == learned
    assert window["learned"] == sum(target != IGNORED for target in sample["targets"])
    documents = windows.document_ids(window["number"]).tolist()
    assert [number for number, count in window["documents"] for _ in range(count)] == documents
    assert (window["shard"], window["offset"]) == windows.locate(window["number"])
    start = windows.shards.token_at(window["shard"], window["offset"])
    before = open_windows(windows.shards, layout="concat", seq_len=1)
    assert window["begins"] == (start == 0 or before.document_ids(start - 1)[0] != documents[0])


def test_pieces_and_joins_spell_the_text(dataset, tmp_path):
    _, reader = write(dataset, tmp_path / "page.html", seq_lens=[400], num_windows=100)
    data = json.loads(reader.scripts[0])
    pad = next(view for view in data["views"] if view["layout"] == "pad")
    spelled = []
    for window in pad["windows"]:
        joins = {first: (count, text) for first, count, text in window["joins"]}
        length = sum(count for number, count in window["documents"] if number >= 0)
        at, text = 1, ""
        while at < length - 1:
            count, piece = joins.get(at, (1, data["pieces"][str(window["ids"][at])]))
            text += piece
            at += count
        spelled.append(text)
    assert spelled == TEXTS
    assert any(window["joins"] for window in pad["windows"])


def test_no_text_becomes_part_of_the_page(dataset, tmp_path):
    _, reader = write(dataset, tmp_path / "page.html")
    empty = Reader()
    empty.feed(read_template("minimind_data.report", "page.html"))
    tags = [(tag, list(attributes)) for tag, attributes in reader.tags]
    assert tags == [(tag, list(attributes)) for tag, attributes in empty.tags]
    data = fill("<style></style><script></script>@data@", {"text": HOSTILE})
    assert not set("<>&\u2028") & set(data.removeprefix("<style></style><script></script>"))
    assert json.loads(data.removeprefix("<style></style><script></script>")) == {"text": HOSTILE}


def test_a_text_that_looks_like_a_mark_of_the_template_stays_a_text():
    data = fill("<style></style><script></script>@data@", {"text": "@data@ @script-hash@ \\1"})
    assert (
        json.loads(data.removeprefix("<style></style><script></script>"))["text"]
        == "@data@ @script-hash@ \\1"
    )


def test_the_page_asks_for_nothing(dataset, tmp_path):
    _, reader = write(dataset, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert set(re.findall(r"\w+://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    for tag, attributes in reader.tags:
        assert not {"src", "srcset", "action"} & set(attributes), (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,"
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(
        attributes["content"]
        for tag, attributes in reader.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digests = [
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (style, reader.scripts[1])
    ]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "connect-src 'none'"
    )


def test_a_page_is_the_same_whenever_it_is_written(dataset, tmp_path):
    write(dataset, tmp_path / "a.html")
    write(dataset, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_page_stays_small_and_says_so(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_TOKENS", 6 * (17 + 41))
    _, reader = write(dataset, tmp_path / "page.html", num_windows=50)
    data = json.loads(reader.scripts[0])
    assert (data["windows_wanted"], data["windows_each"]) == (50, 2)
    assert [len(view["windows"]) for view in data["views"]] == [2] * 6


def test_a_length_without_windows_has_no_view(dataset, tmp_path):
    _, reader = write(dataset, tmp_path / "page.html", seq_lens=[dataset.num_tokens])
    data = json.loads(reader.scripts[0])
    assert [view["layout"] for view in data["views"]] == ["pad", "pack"]


def test_impossible_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file to write"):
        check_page_place(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        check_page_place(tmp_path / "nowhere" / "page.html")
    (tmp_path / "mine.html").write_text("<!doctype html> somebody's")
    with pytest.raises(UserError, match="mine.html: a file of something else"):
        check_page_place(tmp_path / "mine.html")
    (tmp_path / "link.html").symlink_to("nowhere")
    with pytest.raises(UserError, match="link.html: a link that leads nowhere"):
        check_page_place(tmp_path / "link.html")


def test_a_page_is_replaced_by_a_newer_one(dataset, tmp_path):
    write(dataset, tmp_path / "page.html")
    check_page_place(tmp_path / "page.html")
    (tmp_path / "empty.html").touch()
    check_page_place(tmp_path / "empty.html")
