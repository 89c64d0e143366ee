"""Formats: one table, whose row is all that a conversion needs to know of one."""

from collections.abc import Iterator

import numpy as np
import pytest

from minimind_data.interchange import base
from minimind_data.interchange.conversion import ConvertOptions, convert
from minimind_data.interchange.formats import ALIASES, FORMAT_NAMES, FORMATS, SHARDS

DOCUMENTS = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2]]


class Lines(base.TokenFormat):
    """A line of decimal numbers for each document."""

    name = "lines"
    suffix = ".ids"

    def recognizes(self, path, start):
        return path.suffix == self.suffix

    def read(self, files, options) -> Iterator[base.Batch]:
        for number, path in enumerate(files.token_files):
            rows = [np.array(line.split(), np.int64) for line in path.read_text().splitlines()]
            size = path.stat().st_size
            yield base.Batch(
                input=number,
                start=0,
                stop=size,
                num_bytes=size,
                tokens=np.concatenate(rows),
                lengths=np.array([len(row) for row in rows]),
            )

    def write(self, folder, part, options):
        with (folder / f"{part.name}{self.suffix}").open("w") as file:
            for tokens, lengths in part.documents():
                for row in np.split(tokens, np.cumsum(lengths)[:-1]):
                    print(*row, file=file)
        return 0


def test_a_row_is_all_that_a_new_format_needs(bring, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "lines", Lines())
    source = tmp_path / "x.ids"
    source.write_text("".join(f"{' '.join(map(str, one))}\n" for one in DOCUMENTS))
    documents, summary = bring(source)
    assert documents == DOCUMENTS
    assert summary.source_format == "lines"
    convert(tmp_path / "made", ConvertOptions(out=tmp_path / "back"), target_format="lines")
    assert next((tmp_path / "back").glob("*.ids")).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_called_what_its_row_says_and_only_once(name):
    assert FORMATS[name].name == name
    assert FORMATS[name].options <= {"separator_id", "column", "copy"}
    assert ("separator_id" in FORMATS[name].options) is (FORMATS[name].divider is not None)


def test_no_two_formats_share_a_name():
    assert len(FORMAT_NAMES) == len(set(FORMAT_NAMES))
    assert {SHARDS, *ALIASES}.isdisjoint(FORMATS)
    assert set(ALIASES.values()) <= FORMATS.keys()
