"""Adapters: they begin as nothing, they alone are learned and saved, and merged they are what they were beside their matrices."""

import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from minimind_data.errors import UserError
from minimind_train.model.config import LoraConfig, ModelConfig
from minimind_train.model.lora import adapters_of, add_adapters, merge_adapters
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.options import PretrainOptions
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import RunRecord
from minimind_train.weights.exporting import export
from minimind_train.weights.loading import adapted_model, load_weights, model_of
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights

SHAPE = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=40
)
IDS = torch.arange(24).view(2, 12)


def make(**options):
    model = MiniMind(SHAPE)
    initialize(model, 1)
    before = model.logits(model(IDS)).detach()
    add_adapters(model, LoraConfig(lora_rank=3, **options), seed=7)
    return model, before


def shaken(model):
    generator = torch.Generator().manual_seed(2)
    for matrix in adapters_of(model).values():
        matrix.lora_B.data.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize(
    ("targets", "count"), [("q_proj,o_proj", 4), ("all", 14), ("down_proj", 2), ("q_proj, v_proj", 4)]
)
def test_a_model_with_new_adapters_is_the_model_without(targets, count):
    model, before = make(lora_targets=targets)
    assert len(adapters_of(model)) == count
    assert torch.equal(model.logits(model(IDS)), before)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learned) == 2 * count
    assert all(name.endswith((".lora_A", ".lora_B")) for name in learned)
    base = MiniMind(SHAPE).state_dict()
    assert base.keys() == model.state_dict().keys() - learned


def test_the_seed_decides_the_adapters_and_their_scale():
    one, other = (make()[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = torch.cat([t.flatten() for name, t in one.items() if name.endswith("lora_A")])
    assert 0.015 < float(drawn.std()) < 0.025
    assert LoraConfig(lora_rank=4).scale == 1
    assert LoraConfig(lora_rank=4, lora_alpha=8).scale == 2


@pytest.mark.parametrize("alpha", [None, 9.0])
def test_merged_they_do_the_same(alpha):
    model, before = make(lora_targets="all", lora_alpha=alpha)
    shaken(model)
    beside = model.logits(model(IDS)).detach()
    assert not torch.allclose(beside, before, atol=0.01)
    merge_adapters(model)
    assert adapters_of(model) == {}
    assert model.state_dict().keys() == MiniMind(SHAPE).state_dict().keys()
    torch.testing.assert_close(model.logits(model(IDS)).detach(), beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lora_rank": -1}, "`lora_rank` must be from 0"),
        ({"lora_alpha": 0.0}, "`lora_alpha` must be a positive number"),
        ({"lora_targets": "q_proj,w_proj"}, "lora_targets has 'w_proj'; the matrices are q_proj"),
        ({"lora_targets": ""}, "lora_targets has ''"),
    ],
)
def test_options_that_mean_nothing(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        LoraConfig(**options)


def test_experts_get_no_adapters():
    mixture = ModelConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, use_moe=True)
    with pytest.raises(ValueError, match="lora_targets has up_proj, and experts get no adapters"):
        LoraConfig(lora_rank=2, lora_targets="q_proj,up_proj").refuse_unfit(mixture)
    LoraConfig(lora_rank=2, lora_targets="k_proj").refuse_unfit(mixture)
    LoraConfig(lora_targets="all").refuse_unfit(mixture)


@pytest.fixture
def adapt(tmp_path, whole_run, other_dataset):
    """Begin a run of adapters from the whole run's weights."""

    def adapt(name="adapted", **changes):
        usual = PretrainOptions().model
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        options = {option: getattr(usual, option) for option in shape}
        options |= {
            "from_weight": str(whole_run),
            "lora_rank": 2,
            "learning_rate": 1e-2,
            "keep": 0,
            "dropout": 0.1,
        }
        said = Said()
        entry.begin(config_of(tmp_path / name, other_dataset, **{**options, **changes}), said)
        return tmp_path / name, said

    return adapt


def stored(run, step, name=checkpoint.MODEL_NAME):
    return load_file(checkpoint.folder_of(run, step) / name)


def test_checkpoints_hold_adapters_alone_and_the_base_stays(adapt, whole_run):
    run, said = adapt()
    assert "parameters of adapters are learned, in 2 matrices" in said.text
    there = stored(run, 12)
    assert sorted(there) == [
        f"model.layers.0.self_attn.{name}_proj.lora_{side}" for name in "oq" for side in "AB"
    ]
    assert all(tensor.any() for tensor in there.values())
    state = stored(run, 12, checkpoint.OPTIMIZER_NAME)
    assert {name.split(".", 1)[1] for name in state} == set(there)
    base, merged = load_weights(whole_run).tensors, load_weights(run).tensors
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "oq"}
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    record = RunRecord.read(run).options
    assert (record["lora_rank"], record["lora_targets"]) == (2, "q_proj,o_proj")


def test_a_resume_ends_bit_for_bit_as_a_run_that_was_never_stopped(adapt):
    whole, _ = adapt("whole")
    run, _ = adapt("again")
    stop_after(run, 6)
    resume(run, {}, say=Said())
    for name in (checkpoint.MODEL_NAME, checkpoint.OPTIMIZER_NAME):
        assert (checkpoint.folder_of(run, 12) / name).read_bytes() == (
            checkpoint.folder_of(whole, 12) / name
        ).read_bytes()
    assert metrics(run) == metrics(whole)


def test_the_base_is_needed_and_may_move_but_not_change(adapt, tmp_path, whole_run):
    base = shutil.copytree(whole_run, tmp_path / "base")
    run, _ = adapt(from_weight=str(base))
    end, before = weights(run, 12), model_of(run, step=None, say=Said())
    stop_after(run, 9)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"learns adapters alone, so it needs .* gone \(.*base: no such folder"
    ):
        resume(run, {}, say=Said())
    with pytest.raises(UserError, match=r"step-000000009 holds adapters alone, so it needs .* gone"):
        model_of(run, step=None, say=Said())
    shutil.rmtree(checkpoint.folder_of(moved, 12))
    with pytest.raises(UserError, match=r"no checkpoint of step 12"):
        resume(run, {"from_weight": str(moved)}, say=Said())
    with pytest.raises(UserError, match=r"holds others \(in the run: "):
        resume(run, {"from_weight": str(moved), "from_step": 9}, say=Said())
    resume(run, {"from_weight": str(whole_run)}, say=Said())
    assert weights(run, 12) == end
    # Checkpoints from before the move are read by what the run says now.
    assert torch.equal(before.head_weight, model_of(run, step=9, say=Said()).head_weight)


def test_adapters_on_adapters(adapt):
    """A run may begin from one that learned adapters: from the matrices that they were merged into."""
    first, _ = adapt("first")
    second, _ = adapt("second", from_weight=str(first), lora_rank=0, steps=1)
    assert RunRecord.read(second).options["from_sha256"] is not None
    third, _ = adapt("third", from_weight=str(first), lora_rank=1, lora_targets="all", steps=1)
    assert len(adapters_of(adapted_model(third, step=None, say=Said())[0])) == 7


def test_what_adapters_are_cannot_change_on_the_way(adapt):
    run, _ = adapt(steps=3)
    with pytest.raises(UserError, match=r"lora_rank \(in the run: 2, asked for: 3\)"):
        resume(run, {"lora_rank": 3}, say=Said())


def test_adapters_need_weights(adapt):
    with pytest.raises(UserError, match="`lora_rank` puts adapters beside weights that are there"):
        adapt(from_weight=None)


def test_a_run_without_adapters_has_none_to_export(whole_run, tmp_path):
    with pytest.raises(UserError, match="has no adapters, since it was trained without `lora_rank`"):
        export(whole_run, tmp_path / "out", to="peft", say=Said())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_peft_opens_them_on_a_transformers_model(adapt, whole_run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        run, _ = adapt(lora_targets="all", lora_alpha=4.0)
        export(whole_run, tmp_path / "base", to="hf", say=Said())
        export(run, tmp_path / "adapters", to="peft", say=Said())
        export(run, tmp_path / "merged", to="hf", say=Said())
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        ids = torch.arange(3, 27).view(2, 12)
        with torch.no_grad():
            plain = base(ids).logits
            adapted = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
            theirs = adapted(ids).logits
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
            model = model_of(run, step=None, say=Said())
            ours = model.logits(model(ids))
    assert not torch.allclose(theirs, plain, atol=1e-2)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
