"""Runs of a mixture of experts: balanced, cut as one likes, resumed exactly, measured and asked as any other."""

import shutil

import pytest

from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.generation.completion import complete
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.model.presets import PRESETS
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.evaluation import evaluate
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import RunRecord
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights

MIXTURE = {
    "use_moe": True,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "router_aux_loss_coef": 0.1,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def whole_mixture(tmp_path_factory, small_dataset):
    run = tmp_path_factory.mktemp("mixture") / "run"
    said = Said()
    entry.begin(config_of(run, small_dataset, keep=0, **MIXTURE), said)
    return run, said


def test_a_run_begins_with_minimind_s_line_of_parameters(whole_mixture):
    run, said = whole_mixture
    config = options_from(ModelConfig, RunRecord.read(run).options)
    assert config.num_active_parameters < config.num_parameters
    total, active = config.num_parameters / 1e6, config.num_active_parameters / 1e6
    assert f"Model Params: {total:.2f}M-A{active:.2f}M" in said


def test_the_balance_is_learned_and_shown_beside_the_loss(whole_mixture, small_dataset, tmp_path):
    run, _ = whole_mixture
    shown = [record["auxiliary_loss"] for record in metrics(run)]
    assert all(value > 0.9 * MIXTURE["router_aux_loss_coef"] for value in shown)
    unbalanced = {**MIXTURE, "router_aux_loss_coef": 0.0}
    entry.begin(config_of(tmp_path / "run", small_dataset, **unbalanced), Said())
    others = metrics(tmp_path / "run")
    assert "auxiliary_loss" not in others[0]
    assert others[0]["loss"] == metrics(run)[0]["loss"]  # the same weights, before they move
    assert others[-1]["loss"] != metrics(run)[-1]["loss"]


def test_a_resumed_mixture_ends_as_if_it_had_never_been_stopped(whole_mixture, tmp_path):
    whole, _ = whole_mixture
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    stop_after(run, 6)
    resume(run, {}, say=Said())
    assert weights(run, 12) == weights(whole, 12)
    assert metrics(run) == metrics(whole)


def test_cutting_a_batch_of_a_mixture_changes_nothing_but_rounding(small_dataset, tmp_path):
    still = {**MIXTURE, "dropout": 0.0, "steps": 4}  # dropout draws other numbers for other cuts
    runs = []
    for micro_batch in (8, 2):
        runs.append(tmp_path / f"by-{micro_batch}")
        entry.begin(config_of(runs[-1], small_dataset, micro_batch=micro_batch, **still), Said())
    for one, other in zip(*map(metrics, runs), strict=True):
        for name in ("loss", "auxiliary_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_micro_batch_that_has_a_say_is_part_of_the_run(small_dataset, tmp_path):
    run = tmp_path / "run"
    entry.begin(config_of(run, small_dataset, seq_aux=False, **MIXTURE), Said())
    stop_after(run, 6)
    with pytest.raises(UserError, match=r"micro_batch \(in the run: 4, asked for: 2\)"):
        resume(run, {"micro_batch": 2}, say=Said())
    resume(run, {"micro_batch": 2}, allow_change={"micro_batch"}, say=Said())
    assert RunRecord.read(run).options["micro_batch"] == 2


def test_experts_are_part_of_what_a_run_is(whole_mixture, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_mixture[0], run)
    stop_after(run, 6)
    with pytest.raises(UserError, match=r"num_experts \(in the run: 3, asked for: 4\) decides the shape"):
        resume(run, {"num_experts": 4}, say=Said())
    with pytest.raises(
        UserError, match=r"num_experts_per_tok \(in the run: 2, .*`allow_change` num_experts_per_tok"
    ):
        resume(run, {"num_experts_per_tok": 1}, say=Said())


def test_a_run_from_before_mixtures_goes_on_dense(stopped_run):
    record = RunRecord.read(stopped_run)
    since = set(record.options) & {"use_moe", "num_experts", "seq_aux", "inference_rope_scaling"}
    assert len(since) == 4
    for name in since:
        del record.options[name]
    record.write(stopped_run)
    with pytest.raises(UserError, match=r"use_moe \(in the run: False, asked for: True\)"):
        resume(stopped_run, {"use_moe": True}, say=Said())
    resume(stopped_run, {"seq_len": 16}, say=Said())
    assert checkpoint.steps_of(stopped_run)[-1] == 12


def test_a_mixture_is_measured_without_its_balance_and_writes(whole_mixture, small_dataset):
    run, _ = whole_mixture
    found = evaluate(run, small_dataset, device="cpu", say=Said())
    assert 0 < found.loss < 6
    options = GenerateOptions(max_new_tokens=5, temperature=0)
    text = "".join(complete(run, "北京", options, device="cpu", say=Said()))
    assert text == "".join(complete(run, "北京", options, device="cpu", say=Said()))


def test_positions_can_be_stretched_where_a_run_is_asked(tmp_path, small_dataset):
    run = tmp_path / "run"
    entry.begin(config_of(run, small_dataset, max_position_embeddings=16), Said())
    options = GenerateOptions(max_new_tokens=40, temperature=0)
    prompt = "a" * 14

    def length(**changes):
        written = complete(run, prompt, options, device="cpu", changes=changes, say=Said())
        return sum(1 for _ in written)

    assert length() <= 2  # BOS and the prompt leave one place
    stretched = {
        "inference_rope_scaling": True,
        "yarn_factor": 2.0,
        "yarn_original_max_position_embeddings": 16,
    }
    with pytest.raises(
        UserError, match="has 41 tokens and the model reads at most 32.*`inference_rope_scaling`"
    ):
        list(complete(run, "a" * 40, options, device="cpu", changes=stretched, say=Said()))
    assert length(**stretched) > length()


# Published sizes

PUBLISHED = {  # as MiniMind's own code counts them
    "minimind-3": "63.91M",
    "minimind-3-moe": "198.42M-A63.94M",
    "minimind2-small": "25.83M",
    "minimind2": "104.03M",
    "minimind2-moe": "145.03M-A91.95M",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_counts(name):
    assert parameter_line(options_from(ModelConfig, PRESETS[name])) == f"Model Params: {PUBLISHED[name]}"


def test_presets_know_no_option_that_is_none():
    fields = {"vocab_size", *options_from(ModelConfig, {}).__dataclass_fields__}
    for options in PRESETS.values():
        assert options.keys() <= fields
