"""Characters per token of several tokenizers, side by side.

    python benchmarks/compression.py TEXT.jsonl… [--tokenizer DIR …]

The first columns are the tokenizers that ship with this project. Use text that none of them was trained on.
"""

import argparse
import json
from pathlib import Path

from minimind_data.tokenizer.backends import ReferenceEncoder
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_data.tokenizer.places import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    tokenizers = {name: load_tokenizer(name) for name in SHIPPED}
    tokenizers |= {path.name: load_tokenizer(path) for path in arguments.tokenizer}
    print(f"{'characters per token':28} {'characters':>10} " + " ".join(f"{name:>10}" for name in tokenizers))
    for path in arguments.texts:
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        characters = sum(map(len, texts))
        ratios = [
            characters / len(ReferenceEncoder(one).encode_batch(texts)[0]) for one in tokenizers.values()
        ]
        print(f"{path.stem:28} {characters:10,} " + " ".join(f"{ratio:10.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
