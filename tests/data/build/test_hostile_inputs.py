"""Hostile inputs: the documents are what a plain reading gives, or one sentence names the path; nothing in between.

Each seed makes a file or a folder of files and an expectation that shares no code with the package. `check(seed, folder)` can be
called with any number of seeds.
"""

import codecs
import gzip
import io
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_data.tokenizer.loading import load_tokenizer

NAMES = [
    "plain", "with space", "new\nline", "per%20cent", "what?", "a?b=c&d", "ünï 文件", "-dash", "--out", "[glob]*", "*", "{x}", "~", "'q\"",
    "a:b", "a@b", "back\\slash", "...", "x" * 240, "tab\tname", "#hash", "🙂", "s3:", "manifest", "val", "A", "a",
]  # fmt: skip
TEXTS = [
    "hello", "第一个问题", "", " ", "a\nb", "\r\n", "\0", "null\0inside", "\ufeffbom", "🙂" * 20, "<|im_end|>", "e\u0301", "\u2028", "\x85",
    "\x1c", "x" * 300, "word " * 100, "\t", "\u3000", "\uffff", "\U0010ffff", "{}", "}{", "\\", '"', "hello",
]  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


def a_text(rng):
    if rng.random() < 0.1:
        return "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(rng.randrange(40))
        )
    return rng.choice(TEXTS)


def a_line(rng, clean):
    text = json.dumps(a_text(rng), ensure_ascii=rng.random() < 0.5)
    kinds = [
        lambda: f'{{"text": {text}}}',
        lambda: f' {{"id": 1, "text" :\t{text} , "more": [1, {{"text": 5}}]}} ',
        lambda: f'{{"text": 5, "text": {text}}}',
        lambda: (
            f'{{"text": {text}, "number": {rng.choice(("1e308", "1" + "0" * 400, "-0.0", "1E-400", "9" * 30))}}}'
        ),
        lambda: f'{{"text": {text}, "deep": {"[" * 300}{"]" * 300}}}',
        lambda: rng.choice(("", " ", "\t", "\r", " \r", "\x0c")),
    ]
    bad = [
        lambda: rng.choice(
            ("null", "5", "[]", '"a"', "{", "}", "{}", "NaN", "'a'", "\0", "//", '{"text": }', "\ufeff{}")
        ),
        lambda: f'{{"text": {rng.choice(("5", "null", "[]", "{}", "true", "1e999", "NaN", "Infinity"))}}}',
        lambda: f'{{"other": {text}}}',
        lambda: f'{{"text": {text}, "number": {rng.choice(("NaN", "-Infinity", "01", "1.", "+1", "0x1"))}}}',
        lambda: '{"text": "\\ud800"}',
        lambda: '{"text": "ok", "x": "\\udc00"}',
        lambda: '{"text": "raw \n control"}',
        lambda: f'{{"text": {text}}} trailing',
        lambda: f'{{"text": {text}}}{{"text": {text}}}',
        lambda: f'{{"text": {text}, "deep": {"[" * 5000}{"]" * 5000}}}',
        lambda: '{"text": "a\tb"}',
    ]
    line = rng.choice(kinds if clean or rng.random() < 0.7 else bad)().encode()
    if not clean and rng.random() < 0.05:
        at = rng.randrange(len(line) + 1)
        line = (
            line[:at]
            + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\xf4\x90\x80\x80"))
            + line[at:]
        )
    return line


def jsonl(rng, clean):
    end = rng.choice((b"\n", b"\n", b"\r\n"))
    data = end.join(a_line(rng, clean) for _ in range(rng.choice((0, 1, 2, 10, 60))))
    return rng.choice((b"", b"", b"\xef\xbb\xbf")) + data + rng.choice((b"", end))


def read_jsonl(data):
    """Return (texts, number of bad records)."""
    texts, bad = [], 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(
                line.decode()
            )  # with NaN and half surrogate pairs, which do no harm in other fields
            text = record["text"] if isinstance(record, dict) else None
            clean = not (isinstance(text, str) and _SURROGATE.search(text))
        except (ValueError, KeyError, RecursionError):
            text, clean = None, False
        if clean and isinstance(text, str):
            texts.append(text)
        else:
            bad += 1
    return texts, bad


def separated(rng, clean):
    parts = [
        a_text(rng).encode() if clean or rng.random() < 0.9 else b"\xff\xfe" for _ in range(rng.randrange(30))
    ]
    return rng.choice((b"", b"\xef\xbb\xbf")) + b"<sep>".join(parts) + rng.choice((b"", b"<sep>"))


def read_texts(parts):
    texts, bad = [], 0
    for part in parts:
        try:
            text = part.decode()
        except UnicodeDecodeError:
            bad += 1
        else:
            texts.append(text if text.strip() else "")
    return texts, bad


def parquet(rng, clean):
    rows = rng.choice((0, 1, 5, 200))
    texts = [a_text(rng) for _ in range(rows)]
    nulls = texts if clean else [None if rng.random() < 0.1 else text for text in texts]
    column = rng.choice(
        (
            lambda: pa.array(texts, pa.string()),
            lambda: pa.array(nulls, pa.large_string()),
            lambda: pa.array(nulls, pa.string()).dictionary_encode(),
            lambda: pa.array(texts, pa.string_view()),
            lambda: pa.array([[text] for text in texts], pa.list_(pa.string())),
            lambda: pa.array([{"text": text} for text in texts], pa.struct([("text", pa.string())])),
            lambda: pa.array([None] * rows, pa.string()),
            lambda: pa.array([None] * rows, pa.null()),
            lambda: pa.array(range(rows), pa.int64()),
            lambda: pa.array([b"\xff" if not clean else b"a"] * rows, pa.binary()),
            lambda: pa.array([b"\xff\xfe" if not clean else b"a"] * rows, pa.binary()).view(pa.string()),
            lambda: pa.chunked_array([pa.array(texts, pa.string()), pa.array([], pa.string())]),
        )
    )()
    other = pa.array([{"a": [1, None]}] * rows, pa.struct([("a", pa.list_(pa.int64()))]))
    name = rng.choice(("text", "text", "text", "text", "Text", ""))
    table = pa.table({"other": other, name: column})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        compress = rng.choice((10, 1000))
        if rows or rng.random() < 0.5:
            writer.write_table(table, compress)
    return buffer.getvalue()


def read_parquet(data):
    """Return (texts, number of bad records), or None where there are none to be had."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=["text"])
        kind = table.schema.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary()):
            return None
        rows = []
        for chunk in table["text"].chunks:
            for value in chunk:
                try:
                    text = value.as_py()
                    rows.append(text.decode() if isinstance(text, bytes) else text)
                except UnicodeDecodeError:
                    rows.append(None)
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
    return [text for text in rows if text is not None], sum(text is None for text in rows)


def broken(rng, data):
    if not data:
        return data
    at = rng.randrange(len(data))
    return rng.choice(
        (
            data[:at],
            data[at:],
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
            data + b"trailing",
            data[:4] + rng.randbytes(50) + data[-4:],
            b"PARE" + data[4:-4] + b"PARE",
            b"",
        )
    )


def a_file(rng, clean):
    """Return (suffix, bytes, (texts, number of bad records) or None where it must be refused, whether it may be refused)."""
    form = rng.choice(("jsonl", "jsonl", "gz", "zst", "parquet", "parquet", "txt", "garbage"))
    may_be_refused = False
    if form == "parquet":
        data = parquet(rng, clean)
        if may_be_refused := not clean and rng.random() < 0.3:
            data = broken(rng, data)
        return ".parquet", data, read_parquet(data), may_be_refused
    if form == "garbage":
        data = rng.randbytes(rng.randrange(1, 200)) + rng.choice((b"", b"\n"))
        return rng.choice((".jsonl", ".txt", ".parquet", ".jsonl.gz", ".json")), data, None, True
    if form == "txt":
        data = a_text(rng).encode() if clean or rng.random() < 0.8 else b"\xff"
        return ".txt", data, read_texts([data.removeprefix(b"\xef\xbb\xbf")]) if data else None, False
    data = jsonl(rng, clean)
    expected = read_jsonl(data) if data else None
    if form == "jsonl":
        return (
            rng.choice((".jsonl", ".JSONL", ".json", ".ndjson")),
            data,
            expected,
            data.lstrip(b"\xef\xbb\xbf \r\n\t\x0c")[:1] == b"[",
        )
    if form == "gz":
        half = len(data) // 2
        packed = (
            gzip.compress(data)
            if rng.random() < 0.5
            else gzip.compress(data[:half]) + gzip.compress(data[half:])
        )
    else:
        packed = pa.Codec("zstd").compress(data, asbytes=True)
    if not clean and rng.random() < 0.3:
        packed, may_be_refused = broken(rng, packed), True
        expected = None if packed == b"" else expected
    return f".jsonl.{form}", packed, expected, may_be_refused


def check(seed, folder):
    """Tokenize what a seed makes, and compare."""
    rng = random.Random(seed)
    clean = rng.random() < 0.4
    corpus = folder / "corpus"
    corpus.mkdir()
    made = {}
    for _ in range(rng.choice((1, 1, 2, 4))):
        suffix, data, expected, may_be_refused = a_file(rng, clean)
        path = corpus / (rng.choice(NAMES)[: 255 - len(suffix)] + suffix)
        if path.exists() or path.name.startswith("."):
            continue
        path.write_bytes(data)
        made[path] = expected, may_be_refused
    if not made:
        return "nothing"
    order = sorted(made, key=str)
    given = [str(corpus)] if rng.random() < 0.5 else [str(path) for path in order]
    mode = rng.choice(("stop", "set-aside", "set-aside"))
    dedup = rng.choice(("none", "none", "exact"))
    settings = {
        "on_bad_record": mode,
        "dedup": dedup,
        "split_bytes": 1024,
        "workers": 1,
        "backend": "tokenizers",
    }
    out = folder / "out"
    refusal = summary = None
    try:
        summary = tokenize(given, options_from(TokenizeOptions, {"out": out, **settings}))
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert str(corpus) in refusal
        assert not (out / "manifest.json").exists()
        outcomes = list(made.values())
        reasons = [
            any(expected is None or may for expected, may in outcomes),
            mode == "stop" and any(expected and expected[1] for expected, _ in outcomes),
            not any(expected and any(expected[0]) for expected, _ in outcomes),
        ]
        assert any(reasons), refusal
        return "refused"
    assert not verify(out).problems
    manifest = summary.manifest
    found = documents(out)
    if all(expected is not None and not may for expected, may in made.values()):
        texts = [text for path in order for text in made[path][0][0]]
        bad = sum(made[path][0][1] for path in order)
        assert manifest.set_aside == bad
        assert manifest.empty_texts == texts.count("")
        wanted = [text for text in texts if text]
        if dedup == "exact":
            assert manifest.duplicates == len(wanted) - len(set(wanted))
            wanted = list(dict.fromkeys(wanted))
        tokenizer = load_tokenizer()
        ids = [tokenizer.reference.encode(text, add_special_tokens=False).ids for text in wanted]
        assert found == [[tokenizer.info.bos_id, *one, tokenizer.info.eos_id] for one in ids]
    records = sum(entry.origin.lines for entry in manifest.shards)
    assert records >= len(found)
    set_aside = out / "set-aside.jsonl"
    assert manifest.set_aside == (len(set_aside.read_bytes().splitlines()) if set_aside.exists() else 0)
    return "made"


def documents(folder):
    return [
        shard.tokens[start : start + length].tolist()
        for shard in ShardSet.open(folder)
        for start, length in zip(shard.offsets // shard.tokens.itemsize, shard.lengths, strict=True)
    ]


@pytest.mark.parametrize("block", range(6))
def test_hostile_inputs_are_read_exactly_or_refused_in_a_sentence(block, tmp_path):
    outcomes = []
    for seed in range(block * 20, block * 20 + 20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcomes.append(check(seed, folder))
    assert {"made", "refused"} <= set(outcomes)


@pytest.mark.parametrize("mode", ["stop", "set-aside"])
@pytest.mark.parametrize("seed", range(20))
def test_separated_text_is_read_exactly(tmp_path, seed, mode):
    data = separated(random.Random(seed), clean=mode == "stop")
    (tmp_path / "a.txt").write_bytes(data)
    pieces = data.removeprefix(b"\xef\xbb\xbf").split(b"<sep>")
    texts, bad = read_texts(pieces if pieces[-1] else pieces[:-1])
    settings = {"out": tmp_path / "out", "separator": "<sep>", "split_bytes": 1024, "on_bad_record": mode}
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # which says what the file is
    if not data or not any(texts) or marked:
        with pytest.raises(UserError, match=r"a\.txt: looks like UTF-16" if marked else r"a\.txt: "):
            tokenize([tmp_path / "a.txt"], options_from(TokenizeOptions, settings))
        return
    manifest = tokenize([tmp_path / "a.txt"], options_from(TokenizeOptions, settings)).manifest
    tokenizer = load_tokenizer()
    ids = [tokenizer.reference.encode(text, add_special_tokens=False).ids for text in texts if text]
    assert documents(tmp_path / "out") == [
        [tokenizer.info.bos_id, *one, tokenizer.info.eos_id] for one in ids
    ]
    assert (manifest.empty_texts, manifest.set_aside) == (texts.count(""), bad)


def test_a_parquet_file_whose_column_names_are_damaged(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "QQQQ": [1]}), buffer)
    head, *rest = buffer.getvalue().split(b"QQQQ")
    for broken_at in range(len(rest)):
        names = [b"QQQQ"] * len(rest)
        names[broken_at] = b"\xff\xffQQ"
        path = tmp_path / f"{broken_at}.parquet"
        path.write_bytes(head + b"".join(name + part for name, part in zip(names, rest, strict=True)))
        try:
            manifest = tokenize([path], TokenizeOptions(out=tmp_path / str(broken_at))).manifest
        except UserError as error:
            refused = str(error)
        else:
            assert manifest.num_documents == 1  # where the name is not looked at
            continue
        assert re.search(rf"{broken_at}\.parquet: damaged or cut off", refused)
