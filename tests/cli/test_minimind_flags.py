"""MiniMind's command lines, pasted: flags with underscores work, and its own flags are refused with ours in their place."""

import shlex

import pytest
import typer.main

from minimind_cli import train
from minimind_cli.minimind import translation
from tests.helpers.commands import TINY, mm_train
from tests.helpers.minimind_flags import THEIRS, TRAINING


def flags_of(command):
    parameters = typer.main.get_command(train.app).commands[command].params
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}


def typed_instead(command, line):
    """The command line that the refusal ends with, as words."""
    result = mm_train(command, *shlex.split(line))
    assert result.exit_code == 2, result.output
    assert "MiniMind's flag" in result.output
    first, *words = shlex.split(result.output.rstrip().splitlines()[-1])
    assert (first, words[0]) == ("mm-train", command)
    return words[1:]


@pytest.mark.parametrize(
    ("command", "line", "ours"),
    [
        ("pretrain", "--batch_size 16", "--micro-batch 16 --global-batch 128"),
        ("sft", "--batch_size 16", "--micro-batch 16 --global-batch 16"),
        ("sft", "--batch-size=4", "--micro-batch 4 --global-batch 4"),
        ("pretrain", "--batch_size 16 --accumulation_steps 4", "--micro-batch 16 --global-batch 64"),
        ("pretrain", "--accumulation_steps 2", "--global-batch 64"),
        ("dpo", "--accumulation_steps 2", "--global-batch 8"),
        ("pretrain", "--max_seq_len 340", "--seq-len 339"),
        ("sft", "--max_seq_len=768", "--seq-len 767"),
        ("pretrain", "--log_interval 100 --save_interval 1000", "--log-every 12 --save-every 125"),
        ("sft", "--log_interval 100 --accumulation_steps 10", "--log-every 10 --global-batch 160"),
        ("pretrain", "--dtype bfloat16", "--dtype bf16"),
        ("pretrain", "--dtype=float16 --epochs 1", "--dtype fp16 --epochs 1"),
        ("pretrain", "--from_resume 1 --epochs 2", "--resume auto --epochs 2"),
        ("pretrain", "--from_resume 0 --epochs 2", "--epochs 2"),
        ("pretrain", "--use_moe 1", "--use-moe"),
        ("pretrain", "--use_moe 0 --hidden_size 512", "--hidden-size 512"),
        ("pretrain", "--use_compile 1", "--compile"),
        ("pretrain", "--use_wandb --wandb_project Mine", "--track swanlab --track-project Mine"),
        ("pretrain", "--data_path ../dataset/x.jsonl", "--shards data/x"),
        ("pretrain", "--save_dir ../out --save_weight mine", "--run ../out/mine"),
        ("pretrain", "--save_dir ../out", "--run ../out/pretrain"),
        ("sft", "--save_weight 'my own'", "--run 'runs/my own'"),
        ("sft", "--lora_name medical", "--run runs/medical --lora-rank 16 --epochs 10 --learning-rate 1e-4 --seq-len 339 --micro-batch 32 --global-batch 32 --from-weight out/full_sft_768.pth"),
        ("sft", "--lora_name mine --accumulation_steps 2 --epochs 3 --max_seq_len 512 --from_weight dpo", "--run runs/mine --lora-rank 16 --global-batch 64 --epochs 3 --seq-len 511 --from-weight out/dpo_768.pth --learning-rate 1e-4 --micro-batch 32"),
        ("sft", "--from_weight pretrain", "--from-weight out/pretrain_768.pth"),
        ("sft", "--from_weight full_sft --hidden_size 512", "--from-weight out/full_sft_512.pth --hidden-size 512"),
        ("dpo", "--from_weight full_sft --use_moe 1", "--from-weight out/full_sft_768_moe.pth --use-moe"),
        ("pretrain", "--num_workers 8 --beta1 0.9", "--beta1 0.9"),
        ("generate", "--weight full_sft", "--run out/full_sft_768.pth --chat"),
        ("generate", "--load_from ./model --weight dpo --hidden_size 512 --prompt hi", "--run out/dpo_512.pth --hidden-size 512 --prompt hi"),
        ("generate", "--load_from ./minimind-3 --historys 4", "--run ./minimind-3 --chat"),
        ("generate", "--weight pretrain --use_moe 1", "--run out/pretrain_768_moe.pth --use-moe --prompt 为什么天空是蓝色的"),
        ("generate", "--save_dir w --lora_weight lora_medical", "--run w/full_sft_768.pth --lora w/lora_medical_768.pth --chat"),
        ("generate", "--lora_weight None --show_speed 1", "--run out/full_sft_768.pth --chat"),
    ],
)  # fmt: skip
def test_each_flag_has_ours_in_its_place(command, line, ours):
    assert typed_instead(command, line) == shlex.split(ours)


def test_a_length_of_pre_training_comes_with_the_layout_that_it_is_meant_for():
    assert "--layout pad" in mm_train("pretrain", "--max_seq_len", "340").output
    assert "--layout pad" not in mm_train("sft", "--max_seq_len", "768").output


def test_how_the_dataset_is_made_stands_before_the_command():
    for command, kind in (("pretrain", ""), ("sft", " --kind sft"), ("dpo", " --kind dpo")):
        lines = mm_train(command, "--data_path", "../dataset/it.jsonl").output.splitlines()
        assert f"  mm-data tokenize ../dataset/it.jsonl{kind} --out data/it" in lines


@pytest.mark.parametrize("command", ["pretrain", "sft", "dpo"])
def test_every_flag_of_their_training_scripts_works_or_is_named(command):
    theirs = {*TRAINING, "save_weight", *(["beta"] if command == "dpo" else [])}
    theirs |= set(THEIRS["trainer/train_lora.py"]) if command == "sft" else set()
    ours = flags_of(command)
    for name in theirs:
        words = [f"--{name}", "1"]
        assert f"--{name.replace('_', '-')}" in ours or translation(command, words, ours)


def test_what_means_the_same_here_needs_no_other_words():
    ours = flags_of("pretrain")
    line = "--hidden_size 512 --num_hidden_layers 8 --learning_rate 5e-4 --grad_clip 1 --dtype bf16 --from_weight out"
    assert translation("pretrain", shlex.split(line), ours) is None
    assert translation("export", ["--max_seq_len", "3"], flags_of("export")) is None


def test_flags_may_have_underscores(tmp_path, training_data):
    words = [
        word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else word for word in TINY
    ]
    result = mm_train("pretrain", "--shards", training_data, "--run", tmp_path / "run", *words, "--steps=1")
    assert result.exit_code == 0, result.output


def test_a_value_keeps_its_underscores(tmp_path):
    result = mm_train("pretrain", "--shards", tmp_path / "a_b", "--run=--x_y")
    assert f"{tmp_path}/a_b: no dataset" in result.output


def test_resume_stands_alone_or_says_auto(tmp_path, training_data):
    words = ["pretrain", "--run", tmp_path / "run", "--shards", training_data, *TINY, "--save-every", "1"]
    missing = mm_train(*words, "--resume", "--steps", "1")
    assert (missing.exit_code, "no run" in missing.output) == (1, True)
    begun = mm_train("pretrain", "--resume", "auto", *words[1:], "--steps", "1")
    assert begun.exit_code == 0, begun.output
    again = mm_train(*words, "--steps", "1", "--resume", "auto")
    assert (again.exit_code, "finished already" in again.output) == (0, True)
    other = mm_train(*words, "--resume", "auto", "--steps", "1", "--hidden-size", "32")
    assert (other.exit_code, "hidden_size" in other.output) == (1, True)
    further = mm_train(
        "pretrain", "--run", tmp_path / "run", "--steps", "2", "--allow-change", "steps", "--resume"
    )
    assert (further.exit_code, "2 steps" in further.output) == (0, True)
    assert mm_train("pretrain", "--resume=maybe", "--run", tmp_path / "run").exit_code == 2
