"""Layers that are compiled, and whose activations are computed again."""

import copy
import subprocess
import sys

import pytest
import torch

from minimind_data.errors import UserError
from minimind_train.model.compiling import compile_layers, recompute_activations, user_error_on_failed_compile
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.run.entry import resume
from minimind_train.run_folder import checkpoint
from tests.helpers.runs import Said, metrics, stop_after, weights

# Torch's compiler sets off torch's own warnings, which it does not show.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SHAPES = {
    "dense": {},
    "mixture": {"use_moe": True, "num_experts": 3, "num_experts_per_tok": 2},
}


def model_of(dropout=0.0, num_layers=3, **shape):
    model = MiniMind(
        ModelConfig(
            hidden_size=16,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            dropout=dropout,
            **shape,
        )
    )
    initialize(model, 0)
    return model


def batch_of(num_windows=4, length=24, *, packed=False, seed=0):
    tokens = torch.randint(0, 40, (num_windows, length + 1), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    if packed:
        batch["position_ids"] = (torch.arange(length) % 7).expand(num_windows, -1).contiguous()
    return batch


def learned(model, batch, dtype=None):
    """The loss, what balances the experts, and all gradients, with dropout that begins at one place."""
    objective = NextToken(model).train()
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = objective(batch)
    (found.summed if found.auxiliary is None else found.summed + found.auxiliary).backward()
    return [found.summed.detach(), *(each.grad for each in model.parameters())]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("packed", "length", "dtype"), [(False, 24, torch.bfloat16), (True, 24, None), (True, 520, None)]
)
def test_gradients_of_recomputed_activations_are_the_same_bit_for_bit(shape, dropout, packed, length, dtype):
    model = model_of(dropout, **shape)
    again = copy.deepcopy(model)
    recompute_activations(again)
    batch = batch_of(2, length, packed=packed)
    for expected, ours in zip(learned(model, batch, dtype), learned(again, batch, dtype), strict=True):
        assert torch.equal(expected, ours)


def kept_bytes(model, batch):
    """The bytes that a forward pass keeps for the backward pass, beside the weights."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = NextToken(model).train()(batch).summed
    return sum(kept.values()), loss  # with the loss, so that nothing is freed and counted twice


def test_of_each_layer_only_its_input_is_kept():
    batch = batch_of(8, 64)
    sizes = []
    for num_layers in (2, 12):
        model = model_of(num_layers=num_layers)
        recompute_activations(model)
        sizes.append(kept_bytes(model, batch)[0])
    one_input = 8 * 64 * 16 * 4
    assert sizes[1] - sizes[0] <= 10 * one_input
    plain = [kept_bytes(model_of(num_layers=number), batch)[0] for number in (2, 12)]
    assert plain[1] - plain[0] > 100 * one_input


def test_names_and_weights_stay_what_they_are():
    model = model_of()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    compile_layers(model)
    recompute_activations(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in model_of().named_parameters()
    ]


def test_a_run_that_recomputes_is_the_run_that_does_not(begin, tmp_path, whole_run):
    begin(activation_checkpointing=True, dropout=0.1, keep=0)
    assert weights(tmp_path / "run", 12) == weights(whole_run, 12)
    assert metrics(tmp_path / "run") == metrics(whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "packed", "length", "recomputed"),
    [
        ("dense", False, 24, False),
        ("dense", True, 24, True),
        ("dense", True, 520, False),
        ("mixture", False, 24, True),
    ],
)
def test_compiled_layers_learn_the_same_up_to_rounding(shape, packed, length, recomputed):
    torch.compiler.reset()
    model = model_of(**SHAPES[shape])
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
    if recomputed:
        recompute_activations(compiled)
    for num_windows in (4, 3):  # a short batch at the end
        batch = batch_of(num_windows, length, packed=packed, seed=num_windows)
        for expected, ours in zip(learned(model, batch), learned(compiled, batch), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_and_once_more_for_other_sizes():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = model_of(num_layers=12)
    compile_layers(model)
    seen = []
    for num_windows in (4, 4, 3, 4, 2):
        learned(model, batch_of(num_windows))
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [1, 1, 2, 2, 2]
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_run_resumes_up_to_rounding_and_leaves_plain_checkpoints(begin, tmp_path):
    run = tmp_path / "run"
    begin(compile=True, dropout=0.1, steps=6, keep=0)
    lines = metrics(run)
    torch.compiler.reset()  # what is compiled first, for which shape, differs after it, and so may the last bit
    stop_after(run, 3)
    resume(run, {}, say=Said())
    again = metrics(run)
    assert [line["position"] for line in again] == [line["position"] for line in lines]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in again] == pytest.approx([line[name] for line in lines], rel=1e-4)
    stop_after(run, 3)
    resume(
        run, {"compile": False}, say=Said()
    )  # nothing in the checkpoint says that its layers were compiled
    assert [line["loss"] for line in metrics(run)][:3] == [line["loss"] for line in lines][:3]
    assert checkpoint.load(run, 6).state.config["compile"] is False


@pytest.mark.slow
def test_without_a_compiler_the_user_is_told_what_to_do(small_dataset, tmp_path):
    command = [sys.executable, "-m", "minimind_cli.entry", "pretrain", "--compile", "--steps", "2"]
    program = "import sys; from minimind_cli.entry import train; sys.argv[0] = 'mm-train'; train()"
    command[1:3] = ["-c", program]
    options = {"shards": small_dataset, "run": tmp_path / "run", "hidden-size": 16, "num-hidden-layers": 1}
    options |= {"num-attention-heads": 2, "num-key-value-heads": 1, "seq-len": 16, "threads": 1}
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {
        "PATH": "/nowhere",
        "CXX": "/nowhere/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "--compile: torch cannot compile the model here" in done.stderr
    assert "--no-compile" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="mine"), user_error_on_failed_compile():
        raise RuntimeError("mine")
    with pytest.raises(UserError, match="not that"), user_error_on_failed_compile():
        raise UserError("not that")
