"""Conversations as parts of a mixture: each sample is a part's own, with the targets that its mask marks."""

import json

import numpy as np
import pytest

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.dataset.format import IGNORED
from minimind_train.batches.datasets import Datasets


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_a_mixture_of_conversations_gives_the_windows_of_its_parts(tmp_path, layout):
    for name, answer, count in (("zh", "好的。", 40), ("en", "Yes, I will.", 25)):
        records = [
            {
                "messages": [
                    {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": answer * (i % 5 + 1)},
                ]
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenize([tmp_path / f"{name}.jsonl"], TokenizeOptions(out=tmp_path / name, kind="sft", workers=1))
    words = [f"zh={tmp_path / 'zh'}:3", f"en={tmp_path / 'en'}:1"]
    datasets = Datasets.open(words)
    windows = datasets.windows(say=lambda _: None, layout=layout, seq_len=32)
    order = datasets.order(windows, seed=1, kind="shuffled")
    batch = windows.fetch(order.windows(np.arange(64)))
    alone = [part.fetch(np.arange(len(part))) for part in windows.parts]
    known = {
        (inputs.tobytes(), targets.tobytes())
        for part in alone
        for inputs, targets in zip(part["input_ids"], part["targets"], strict=True)
    }
    rows = zip(batch["input_ids"], batch["targets"], strict=True)
    assert {(inputs.tobytes(), targets.tobytes()) for inputs, targets in rows} <= known
    assert (batch["targets"] != IGNORED).any(axis=1).all()
    assert (batch["targets"] == IGNORED).any()
