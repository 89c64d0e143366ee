"""OrderedTrainer on several real processes: the same samples in the same steps, and a resume on another number of them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from minimind_train.order.sample_order import SampleOrder

pytest.importorskip("transformers")

_RANK = """
import json, os, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from minimind_data import ShardSet, open_windows
from minimind_train.integrations.hf_trainer import OrderedTrainer
from minimind_train.batches.torch_loader import WindowDataset
from minimind_train.order.sample_order import SampleOrder

torch.set_num_threads(1)
torch.manual_seed(0)
dataset, out, micro_batch, accumulation, steps, go_on = sys.argv[1:]
windows = open_windows(ShardSet.open(dataset), layout="concat", seq_len=16, labels=True)
seen = []

class Recorder(WindowDataset):
    def __getitems__(self, numbers):
        seen.append(numbers)
        return super().__getitems__(numbers)

config = LlamaConfig(
    vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)
args = TrainingArguments(
    out, per_device_train_batch_size=int(micro_batch), gradient_accumulation_steps=int(accumulation), max_steps=int(steps),
    save_steps=3, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    lr_scheduler_type="constant", ddp_backend="gloo" if "RANK" in os.environ else None,
)
order = SampleOrder(num_windows=len(windows), seed=5)
trainer = OrderedTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=Recorder(windows), order=order)
trainer.train(resume_from_checkpoint=go_on == "go on" or None)
losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
Path(out, f"seen-{steps}-{args.process_index}.json").write_text(json.dumps([args.world_size, seen, losses]))
"""


def train(script, dataset, out, *, world_size, micro_batch, accumulation, steps, go_on=False):
    """Train on so many processes; return (what all of them read, micro-batch by micro-batch; the losses)."""
    words = [script, dataset, out, micro_batch, accumulation, steps, "go on" if go_on else "begin"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    launch = launch if world_size > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((out / f"seen-{steps}-{rank}.json").read_text()) for rank in range(world_size)]
    assert [one[0] for one in told] == [world_size] * world_size
    batches = []
    for shares in zip(*(one[1] for one in told), strict=True):
        whole = [0] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            whole[rank::world_size] = share
        batches.append(whole)
    return [number for batch in batches for number in batch], told[0][2]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_then_one_learn_what_one_learns(tmp_path, small_dataset):
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    windows = open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=16)
    order = SampleOrder(num_windows=len(windows), seed=5)
    alone, losses = train(
        script, small_dataset, tmp_path / "alone", world_size=1, micro_batch=4, accumulation=2, steps=6
    )
    assert alone == order.windows(np.arange(48)).tolist()
    out = tmp_path / "both"
    both, first = train(script, small_dataset, out, world_size=2, micro_batch=2, accumulation=2, steps=3)
    assert both == alone[:24]
    rest, last = train(
        script, small_dataset, out, world_size=1, micro_batch=8, accumulation=1, steps=6, go_on=True
    )
    assert rest == alone[24:]
    assert first == pytest.approx({step: losses[step] for step in first}, rel=1e-4)
    assert last == pytest.approx(losses, rel=1e-4)
