"""Hard strings: texts on which encoders that call themselves equal have been seen to differ.

A backend must agree with `tokenizers` on all of them, for the tokenizer at hand, before it does any work (`tokenizer.choose_backend`). The list
is made by rule, so it is the same in every run, and is short enough (some tens of kilobytes) to cost a few hundredths of a second.
"""

import itertools
import random
from collections.abc import Iterable

_SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " \n",
    "\n ",
    "\t \t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u2028",
    "\x0b",
    "\x0c",
    "\x85",
]
_CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "’s", "'S", "'RE", "'Ll", "''s", "'x", "'"]
_WORDS = [
    "a",
    "I",
    "word",
    "don",
    "we",
    "naïve",
    "Straße",
    "ǅ",
    "ﬁ",
    "é",
    "e\u0301",
    "你",
    "你好",
    "世界",
    "日本語",
    "한국어",
    "العربية",
    "עברית",
    "हिन्दी",
    "ไทย",
    "ქართული",
    "Ελληνικά",
    "Русский",
    "𝔘𝔫𝔦",
    "𐍈",
    "𠮷",
    "ﷺ",
]
_NUMBERS = [
    "0",
    "7",
    "42",
    "007",
    "1234567890",
    "3.14",
    "1,000",
    "½",
    "²",
    "Ⅷ",
    "٣",
    "९",
    "一二三",
    "0x1F",
    "1e-9",
]
_SIGNS = [
    "!",
    "?!",
    "...",
    "…",
    "——",
    "。",
    "，",
    "“”",
    "《》",
    "#",
    "@",
    "_",
    "__init__",
    "-->",
    "</a>",
    "{}",
    "\\",
    "/*",
    "`",
    "$x$",
    "€",
    "©",
    "™",
    "\u00ad",
    "\ufeff",
    "\ufffd",
]
_EMOJI = ["🙂", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳", "1️⃣", "☺️", "\U0001f9d1\u200d\U0001f680"]
_CONTROLS = ["\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x80", "\x9f", "\ue000", "\uffff", "\U0010ffff"]
_RANDOM_TEXTS = 160
_RANDOM_SEED = 20_240_927


def hard_strings(added_tokens: Iterable[str]) -> list[str]:
    """Return the battery.

    Args:
        added_tokens: the contents of the tokenizer's added tokens; each is put at the ends, in the middle, doubled, next to
            spaces, cut short and written in another case.
    """
    pieces = [*_SPACES, *_CONTRACTIONS, *_WORDS, *_NUMBERS, *_SIGNS, *_EMOJI, *_CONTROLS]
    texts = [piece for one in pieces for piece in (one, f"x{one}", f"{one}x", f" {one} ", one * 3)]
    texts += [
        f"{word}{space}{tail}"
        for word, space, tail in itertools.product(["we", "你"], _SPACES, _CONTRACTIONS[:8])
    ]
    texts += [" " * n + "x" + " " * n for n in (2, 3, 4, 7, 8, 15, 16, 17, 31, 64, 127)]
    texts += ["a" * 1000, "ab" * 700, "1" * 500, "!" * 500, "你好" * 300, "\n" * 300, "é" * 300, "🙂" * 100]
    tokens = list(added_tokens)
    for token in tokens:
        texts += [token, f"a{token}b", f"你{token}好", f" {token} ", f"{token}\n{token}", token * 2]
        texts += [
            token[:-1],
            token[1:],
            token.upper(),
            token.replace("|", "｜"),
            f"{token[: len(token) // 2]} {token}",
        ]
    source = random.Random(_RANDOM_SEED)  # noqa: S311 - nothing secret: the same mixtures in every run
    pieces += tokens
    texts += ["".join(source.choices(pieces, k=source.randint(2, 24))) for _ in range(_RANDOM_TEXTS)]
    return texts
