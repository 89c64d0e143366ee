"""docs/from-minimind.md leads to flags that there are, from every flag that MiniMind's scripts have."""

import re
from pathlib import Path

import pytest
import typer

from minimind_cli import train

PAGE = (Path(__file__).parent.parent / "docs" / "from-minimind.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## `([^`]*)`: `mm-train (\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)

TRAINING = [
    "save_dir",
    "epochs",
    "batch_size",
    "learning_rate",
    "device",
    "dtype",
    "num_workers",
    "accumulation_steps",
    "grad_clip",
    "log_interval",
    "save_interval",
    "hidden_size",
    "num_hidden_layers",
    "max_seq_len",
    "use_moe",
    "data_path",
    "from_weight",
    "from_resume",
    "use_wandb",
    "wandb_project",
    "use_compile",
]
THEIRS = {
    "trainer/train_pretrain.py": [*TRAINING, "save_weight"],
    "trainer/train_full_sft.py": [],
    "trainer/train_lora.py": ["lora_name"],
    "trainer/train_dpo.py": ["beta"],
    "eval_llm.py": [
        "load_from",
        "save_dir",
        "weight",
        "lora_weight",
        "hidden_size",
        "num_hidden_layers",
        "use_moe",
        "inference_rope_scaling",
        "max_new_tokens",
        "temperature",
        "top_p",
        "open_thinking",
        "historys",
        "show_speed",
        "device",
    ],
    "scripts/convert_model.py": [],
}
"""The flags of each script; those of training that are the same everywhere stand at pre-training."""


def flags_of(command):
    application = typer.main.get_command(train.app)
    parameters = application.commands[command].params
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}


def rows(text):
    return [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def test_every_script_has_its_table():
    assert [script for script, _, _ in SECTIONS] == list(THEIRS)


@pytest.mark.parametrize(("script", "command", "text"), SECTIONS, ids=[script for script, _, _ in SECTIONS])
def test_a_table_begins_at_their_flags_and_ends_at_ours(script, command, text):
    ours = flags_of(command)
    told = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(f"{here} {note}" for _, here, note in rows(text)))
    assert told
    assert set(told) <= ours
    theirs = {flag for cell, _, _ in rows(text) for flag in re.findall(r"--(\w+)", cell)}
    assert set(THEIRS[script]) <= theirs
    if command != "export":
        assert theirs <= {*TRAINING, *THEIRS[script], "nproc_per_node"}
