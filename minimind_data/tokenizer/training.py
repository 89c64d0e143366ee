"""train_tokenizer(): a byte-level BPE vocabulary from texts, with MiniMind's special tokens at MiniMind's ids.

The `tokenizers` library trains. What is decided here is the kind of vocabulary: GPT-2's byte-level splitting, all 256
bytes in the alphabet so that any text can be encoded, and the 36 special tokens of minimind-3 first.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_data.dataset.format import MANIFEST_NAME, TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from minimind_data.dataset.occupancy import (
    has_content,
    is_manifest,
    refuse_folder_of_another,
    refuse_replacing,
)
from minimind_data.errors import UserError
from minimind_data.files import write_atomic
from minimind_data.tokenizer.places import SHIPPED

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_CONTROL_TOKENS = [
    PAD, BOS, EOS,
    *(f"<|{name}|>" for name in (
        "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end",
        "vision_pad", "image_pad", "video_pad", "audio_start", "audio_end", "audio_pad",
    )),
    "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
]  # fmt: skip

# Part of the text that a model reads and writes, so a decoder that leaves out special tokens keeps them.
_VISIBLE_TOKENS = [
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    *(f"<|buffer{number}|>" for number in range(1, 10)),
]  # fmt: skip

SPECIAL_TOKENS = [*_CONTROL_TOKENS, *_VISIBLE_TOKENS]

_CONFIG = {
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
"""What tokenizer_config.json says."""

_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_MAX_VOCAB_SIZE = 2**22
_SECONDS_TO_STOP = 1.0


def train_tokenizer(texts: Iterable[str], out: Path | str, *, vocab_size: int = 6400) -> int:
    """Train a tokenizer and write it with its `tokenizer_config.json` and a chat template beside it.

    Args:
        texts: to train on; `inputs.splits.texts_of` reads them from files.
        out: the tokenizer.json to write, or a folder for it.
        vocab_size: entries, special tokens included.

    Returns:
        The number of entries. It is below `vocab_size` if the text has too few pairs to merge.

    Raises:
        UserError: `vocab_size` is too small or too large, or a file would be overwritten that is no tokenizer trained here.
    """
    if not _MIN_VOCAB_SIZE <= vocab_size <= _MAX_VOCAB_SIZE:
        raise UserError(
            f"`vocab_size` {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{_MIN_VOCAB_SIZE}, and over {_MAX_VOCAB_SIZE:,} serve no model",
            option="vocab_size",
        )
    out = Path(out)
    file = out if out.suffix == ".json" else out / TOKENIZER_NAME
    config = json.dumps(_CONFIG, indent=1) + "\n"
    template = (SHIPPED["default"] / TEMPLATE_NAME).read_text("utf-8")
    beside = {file.with_name(TOKENIZER_CONFIG_NAME): config, file.with_name(TEMPLATE_NAME): template}
    _refuse_foreign_files(file, beside)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(tokenizer, trainer, _without_special_tokens(texts))
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, content in beside.items():
        write_atomic(path, content)
    write_atomic(file, _with_visible_tokens(tokenizer) + "\n")
    size: int = tokenizer.get_vocab_size(with_added_tokens=True)
    return size


def _refuse_foreign_files(file: Path, beside: Mapping[Path, str]) -> None:
    """Refuse to write where there is something else than a tokenizer that was trained here before.

    Args:
        file: the tokenizer.json.
        beside: the content of the other files, by their paths. They are the same for each tokenizer that is trained here, so they tell
            whose the tokenizer.json is.

    Raises:
        UserError: there is.
    """
    folder = file.parent
    refuse_folder_of_another(folder, "out")
    if is_manifest(folder / MANIFEST_NAME):
        raise UserError(
            "the folder of a dataset, which has a tokenizer of its own",
            where=folder,
            remedy="take another `out`, such as a new folder",
            option="out",
        )
    for path, content in beside.items():
        refuse_replacing(path, "out", is_ours=has_content(content.encode()))
    is_retrained = all(path.is_file() for path in beside)
    refuse_replacing(file, "out", is_ours=lambda _: is_retrained)


def _without_special_tokens(texts: Iterable[str]) -> Iterator[str]:
    """Yield the parts of texts between special tokens, which must not become merges."""
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for text in texts:
        yield from filter(None, special.split(text))


def _train(tokenizer: tokenizers.Tokenizer, trainer: trainers.Trainer, texts: Iterator[str]) -> None:
    """Train in another thread, so that Ctrl-C works: the library notices no signal while it merges, which may take minutes."""
    stopped = False
    errors: list[BaseException] = []

    def read() -> Iterator[str]:
        for text in texts:
            if stopped:
                raise InterruptedError
            yield text

    def work() -> None:
        try:
            tokenizer.train_from_iterator(read(), trainer)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=work, name="train-tokenizer", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        stopped = True
        # It stops between two texts; while it merges it goes on until the process ends.
        thread.join(_SECONDS_TO_STOP)
        raise
    if errors:
        raise errors[0]


def _with_visible_tokens(tokenizer: tokenizers.Tokenizer) -> str:
    """Return the tokenizer's JSON. Its trainer marks all of `SPECIAL_TOKENS` as special; decoders would leave out the visible ones too."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in _CONTROL_TOKENS
    return json.dumps(content, ensure_ascii=False, indent=1)
