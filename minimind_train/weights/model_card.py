"""README.md of an exported model: what it was trained on and with, as far as the run says, and what its owner must still say himself."""

from pathlib import Path
from typing import Any

from minimind_train.model.config import ModelConfig, parameter_line
from minimind_train.run_folder.metrics import FILE_NAME, read_metrics
from minimind_train.run_folder.record import RunRecord

NAME = "README.md"
_PHASES = {
    "pretrain": "pre-training",
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization (DPO)",
}


def model_card(
    name: str,
    *,
    config: ModelConfig,
    architecture: str,
    tokenizer: str,
    run: Path,
    record: RunRecord | None,
    step: int | None,
    lora: Path | None,
) -> str:
    """Return the text of the card.

    Args:
        name: of the model.
        config: its shape.
        architecture: the class of transformers that opens it.
        tokenizer: which one it has, in words.
        run: the folder of the run, or where the weights come from.
        record: the run's; None for weights that are no run's.
        step: of the checkpoint of the run.
        lora: the file of adapters that was merged into it.
    """
    rows = [
        ("model", f"{architecture}, {parameter_line(config).removeprefix('Model Params: ')} parameters"),
        ("vocabulary", f"{config.vocab_size:,} entries; {tokenizer}"),
        ("longest sequence", f"{config.longest_sequence:,} tokens"),
    ]
    if record is None:
        rows.append(("weights", f"converted from `{run}`; how they were trained is not known here"))
    else:
        rows += _of_run(run, record, step)
    if lora is not None:
        rows.append(("adapters", f"`{lora.name}`, merged"))
    table = "\n".join(f"| {what} | {value.replace('|', chr(92) + '|')} |" for what, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
# license: say which one, after asking what the licences of the data and of the initial weights allow
---

# {name}

| | |
|---|---|
{table}

**Licence: open.** Whoever publishes this model decides, and names the licence here and above. It depends on the data and on the weights
that it began from.

Not measured here: what the model knows, and whether what it says is true or harmless.
"""


def _of_run(run: Path, record: RunRecord, step: int | None) -> list[tuple[str, str]]:
    options: dict[str, Any] = record.options
    shards = options.get("shards")
    datasets = [shards] if isinstance(shards, str) else shards if isinstance(shards, list) else []
    data = ", ".join(f"`{Path(str(each)).name}`" for each in datasets) or "not known"
    rows = [
        ("trained by", _PHASES.get(record.command, record.command)),
        ("data", f"{data} (fingerprint {record.dataset[:12]}…)"),
    ]
    if origin := options.get("from_weight"):
        rows.append(("began from", f"`{Path(str(origin)).name}`"))
    if rank := options.get("lora_rank"):
        rows.append(("adapters", f"of rank {rank}, merged"))
    metrics = [line for line in read_metrics(run / FILE_NAME) if step is None or line["step"] <= step]
    sizes = f" of {options['global_batch']} samples" if "global_batch" in options else ""
    rows.append(("steps", f"{step:,}{sizes}" if step is not None else "not known"))
    losses = [f"{line['loss']:.4f} at step {line['step']:,}" for line in metrics if "loss" in line][-1:]
    losses += [
        f"{line['val_loss']:.4f} in validation at step {line['step']:,}"
        for line in metrics
        if "val_loss" in line
    ][-1:]
    rows.append(("loss", "; ".join(losses) or "not logged"))
    return rows
