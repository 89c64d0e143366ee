"""Whose folder it is, by what lies in it."""

import pytest

from minimind_data.dataset.occupancy import owner_of


@pytest.mark.parametrize(
    ("files", "owner"),
    [
        ({}, None),
        ({"notes.txt": "mine"}, None),
        ({"config.json": "{}", "metrics.jsonl": ""}, "a training run"),
        ({"config.json": "{}", "run.toml": ""}, "a training run"),
        ({"config.json": "{}", "checkpoints/x": ""}, "a training run"),
        ({"metrics.jsonl": "", "run.toml": ""}, None),  # somebody's own files of these names
        ({"config.json": "no JSON", "run.toml": ""}, None),
        ({"config.json": "[]", "run.toml": ""}, None),
        ({"config.json": '{"model_type": "qwen3"}'}, "a model"),
        ({"config.json": '{"architectures": ["LlamaForCausalLM"]}'}, "a model"),
        ({"config.json": '{"mine": 1}'}, None),
        ({"adapter_config.json": "{}"}, "a model"),
        ({"model.safetensors": ""}, "a model"),
        ({"full_sft_768.pth": ""}, "a model"),
        ({"pytorch_model-00001-of-00002.bin": ""}, "a model"),
        ({"sample-00000.bin": ""}, None),
    ],
)
def test_a_folder_is_whose_files_it_has(tmp_path, files, owner):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert owner_of(tmp_path) == owner
    assert owner_of(tmp_path / "nowhere") is None
