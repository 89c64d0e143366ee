"""Object stores, against an S3 server on this machine: the shards are those of the same files on a disk."""

import gzip
import itertools
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_data.build.pipeline import commit, tokenize
from minimind_data.dataset.verification import verify
from minimind_data.errors import UserError
from minimind_data.inputs import stores
from minimind_data.inputs.discovery import find_sources, stem_of
from tests.helpers.builds import options

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

TEXTS = [f"Text number {i} 第{i}个" + " filler" * (i % 40) for i in range(400)]
FILES = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d e%20f.jsonl", "deep/é#[x].jsonl", "deep/z.txt")


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")} | {
        path.name: path.read_bytes() for path in folder.glob("*.idx")
    }


def lines(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The files that the store holds, on the disk."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep").mkdir()
    parts = [TEXTS[start : start + 70] for start in range(0, 400, 70)]
    (folder / FILES[0]).write_bytes(lines(parts[0]))
    (folder / FILES[1]).write_bytes(gzip.compress(lines(parts[1])))
    pq.write_table(pa.table({"text": parts[2]}), folder / FILES[2], row_group_size=20)
    (folder / FILES[3]).write_bytes(lines(parts[3]))
    (folder / FILES[4]).write_bytes(lines(parts[4]))
    (folder / FILES[5]).write_text(parts[5][0])
    (folder / "README.md").write_text("of no known form")
    (folder / ".hidden.jsonl").write_bytes(lines(["hidden"]))
    return folder


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    yield "{}:{}".format(*started.get_host_and_port())
    started.stop()


@pytest.fixture(scope="module")
def client(server):
    keys = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "a-secret"}
    made = boto3.client("s3", endpoint_url=f"http://{server}", region_name="us-east-1", **keys)
    yield made
    made.close()


_numbers = itertools.count()


@pytest.fixture
def bucket(client, corpus):
    """A new bucket with the corpus under the prefix `corpus`."""
    name = f"bucket-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    for path in corpus.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=name, Key=f"corpus/{path.relative_to(corpus)}", Body=path.read_bytes())
    client.put_object(Bucket=name, Key="corpus/marker/", Body=b"")
    return name


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")


@pytest.fixture
def endpoint(monkeypatch, server):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")


def test_a_prefix_gives_the_shards_of_the_folder(endpoint, bucket, corpus, tmp_path):
    said = []
    remote = tokenize([f"s3://{bucket}/corpus"], options(tmp_path / "remote"), say=said.append)
    local = tokenize([str(corpus)], options(tmp_path / "local"))
    assert remote.made_shards == local.made_shards > len(FILES)
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")
    assert any(
        f"s3://{bucket}/corpus: 1 files of no known form are left out (README.md)" in one for one in said
    )
    told = [[(one.bytes, one.sha256, one.form) for one in made.manifest.inputs] for made in (remote, local)]
    assert told[0] == told[1]
    assert remote.manifest.inputs[0].path == f"s3://{bucket}/corpus/a.jsonl"
    assert not verify(tmp_path / "remote").problems
    assert tokenize([f"s3://{bucket}/corpus/"], options(tmp_path / "remote")).already_done


@pytest.mark.parametrize("name", FILES)
def test_every_form_by_its_own_uri(server, bucket, corpus, tmp_path, name):
    escaped = name.replace("%", "%25")  # what else may not stand in a URI is escaped for the user
    uri = f"s3://{bucket}/corpus/{escaped}?endpoint_override={server}&scheme=http&region=us-east-1"
    tokenize([uri], options(tmp_path / "remote"))
    tokenize([corpus / name], options(tmp_path / "local"))
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("corpus/*.jsonl", ["a", "d e%20f"]),
        ("corpus/[ab].*", ["a", "b"]),
        ("corpus/*/*.jsonl", ["é#[x]"]),
        ("corpus/**/*.jsonl", ["a", "d e%20f", "é#[x]"]),
        ("**/z.*", ["z"]),
        ("corpus/deep/*%5Bx*", ["é#[x]"]),
    ],
)
def test_globs_match_as_on_a_disk(endpoint, bucket, pattern, names):
    assert [stem_of(source) for source in find_sources([f"s3://{bucket}/{pattern}"])[0]] == names


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("s3://BUCKET/corpus/nope.jsonl", "nope.jsonl: no such file; check the bucket and the key"),
        ("s3://no-bucket/a.jsonl", "s3://no-bucket/a.jsonl: no such file; check the bucket"),
        ("s3://no-bucket/*.jsonl", r"s3://no-bucket/\*.jsonl: cannot be reached .*NO_SUCH_BUCKET"),
        ("s3://BUCKET/corpus/*.nope", r"corpus/\*.nope: no file matches"),
        ("s3://BUCKET/corpus/marker", "marker: a folder without any file of a known form"),
        ("s3://BUCKET/corpus/a.jsonl?what=1", "cannot be reached .*Unexpected query parameter"),
        ("s3://*/a.jsonl", "names no bucket"),
        ("s3://", "names no bucket"),
    ],
)
def test_what_is_not_there_is_one_sentence(endpoint, bucket, uri, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as caught:
        tokenize([uri.replace("BUCKET", bucket)], options(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_credentials_and_no_server(server, bucket, monkeypatch):
    monkeypatch.setattr(stores, "_TRIES", 1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    uri = f"s3://{bucket}/corpus/a.jsonl?scheme=http&endpoint_override="
    with pytest.raises(
        UserError, match=r"a\.jsonl: cannot be reached .*ACCESS_DENIED.*check the address, the cred"
    ):
        find_sources([uri + server])
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be reached .*NETWORK_CONNECTION"):
        find_sources([f"{uri}127.0.0.1:{port}"])


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(stores, "_TRIES", 2)
    tries = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def accept():
            try:
                while True:
                    tries.append(silent.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match="cannot be reached .*NETWORK_CONNECTION"):
            find_sources([f"s3://bucket/a.jsonl?scheme=http&endpoint_override=127.0.0.1:{port}"])
        silent.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert len(tries) == 2
    for one in tries:
        one.close()


def test_a_dataset_grows_by_one_object(endpoint, client, bucket, tmp_path):
    before = tokenize([f"s3://{bucket}/corpus"], options(tmp_path / "out"))
    client.put_object(Bucket=bucket, Key="corpus/more.jsonl", Body=lines(TEXTS[-50:]))
    grown = tokenize([f"s3://{bucket}/corpus"], options(tmp_path / "out"))
    assert grown.kept_shards == before.made_shards
    anew = tokenize([f"s3://{bucket}/corpus"], options(tmp_path / "anew"))
    assert shards(tmp_path / "out") == shards(tmp_path / "anew")
    assert grown.manifest == anew.manifest


KILLED = """
import os, sys
from minimind_data.build import pipeline as build
from minimind_data.build import work_folder
from minimind_data.build.plan import TokenizeOptions
from pathlib import Path
write, made = work_folder.WorkFolder.write_result, []
def die(folder, result):
    write(folder, result)
    made.append(result)
    if len(made) == 3:
        os._exit(9)
work_folder.WorkFolder.write_result = die
build.tokenize([sys.argv[1]], TokenizeOptions(out=Path(sys.argv[2]), workers=1, split_bytes=8192))
"""


def test_a_killed_run_goes_on_and_leaves_no_secret(server, bucket, corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    uri = f"s3://AKIAUSER:hush%2Fhush@{bucket}/corpus?endpoint_override=http://{server}&region=us-east-1"
    killed = subprocess.run([sys.executable, "-c", KILLED, uri, str(tmp_path / "out")], check=False)
    assert killed.returncode == 9
    plan = json.loads((tmp_path / "out" / ".mm-build" / "plan.json").read_text())
    assert plan["inputs"][0]["location"].startswith(f"s3://{bucket}/corpus/a.jsonl?endpoint_override=")
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    said = []
    resumed = tokenize([uri], options(tmp_path / "out"), say=said.append)
    assert resumed.kept_shards == 3
    tokenize([str(corpus)], options(tmp_path / "local"))
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    written += [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for secret in (b"hush", b"AKIAUSER"):
        assert not any(secret in data for data in [*written, *(one.encode() for one in said)])


def test_slices_are_joined_with_credentials_from_the_environment(server, bucket, tmp_path, monkeypatch):
    uri = f"s3://AKIAUSER:hushhush@{bucket}/corpus?endpoint_override=http://{server}&region=us-east-1"
    for number in (1, 2):
        tokenize([uri], options(tmp_path / "out", task=(number, 2)))
    joined = commit(tmp_path / "out")
    tokenize([uri], options(tmp_path / "whole"))
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert joined.manifest.inputs[0].path == f"s3://{bucket}/corpus/a.jsonl"
    shutil.rmtree(tmp_path / "out")
    tokenize([uri], options(tmp_path / "out", task=(1, 1)))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="cannot be reached .*the credentials and the region"):
        commit(tmp_path / "out")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAUSER:hushhush@bucket/a.jsonl?endpoint_override=127.0.0.1:1&scheme=nope",
        "s3://AKIAUSER:hush/hush@bucket/a.jsonl",  # no URI: the secret has a slash
        "s3://AKIAUSER:hush?hush@bucket/a.jsonl",
        "s3://AKIAUSER:hush hush@bucket/a.jsonl",
        "s3://AKIAUSER:hushhush@bucket/*.jsonl?what=hushhush",
        "s3://bucket/a.jsonl?endpoint_override=AKIAUSER:hushhush@nowhere.invalid&scheme=bad",
        "abfs://:hushhush@account.blob.core.windows.net/x/a.jsonl?client_secret=hushhush&nope=1",
    ],
)
def test_no_message_shows_credentials(uri):
    with pytest.raises(UserError) as caught:
        find_sources([uri])
    assert "hush" not in str(caught.value)
    assert "AKIAUSER" not in str(caught.value)
    for told in (stores.shown(uri), stores.without_secrets(uri)):
        assert "hush" not in told
        assert "AKIAUSER" not in told


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        (
            "abfs://container@account.example/x?tenant_id=t&enable_tls=false",
            "abfs://container@account.example/x?enable_tls=false",
        ),
        ("hdfs://host:8020/user@home/x", "hdfs://host:8020/user@home/x"),
        ("s3://bucket/a@b:c.jsonl?region=eu", "s3://bucket/a@b:c.jsonl?region=eu"),
        ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x"),
    ],
)
def test_what_is_no_secret_stays(uri, kept):
    assert stores.without_secrets(uri) == kept
