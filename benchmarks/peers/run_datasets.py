"""Hugging Face `datasets`: load_dataset("json"), a batched map over as many processes as cores, save_to_disk as Arrow."""

from typing import Any

from datasets import load_dataset
from task import Task
from tokenizers import Tokenizer


def main() -> None:
    task = Task.read()
    tokenizer = Tokenizer.from_file(str(task.tokenizer))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    text = load_dataset(
        "json", data_files=str(task.text), split="train", cache_dir=str(task.out.with_name("cache"))
    )
    tokens = text.map(encode, batched=True, num_proc=task.cores, remove_columns=text.column_names)
    tokens.save_to_disk(str(task.out / "arrow"))


if __name__ == "__main__":
    main()
