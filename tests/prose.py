"""Texts that compress as what people write does: words of a vocabulary, the short ones often.

The law of this file: a text is made of its seed and nothing else, so that whoever knows the seed knows the text; it
imports nothing of the package. The same letter ten thousand times would compress a thousandfold, noise not at all;
this becomes a third to a half of itself, alone, and less where the words of an earlier text are still known.
"""

from __future__ import annotations

import random
from typing import Literal, get_args

Kind = Literal["prose", "accents", "echo", "noise"]
KINDS: tuple[Kind, ...] = get_args(Kind)

VOCABULARY = """
a I of to in is it we be on at as so do no up the and you for are but not all can was one our out day get has him
how man new now old see two way who did its let put say she too use that with have this will your from they know
want been good much some time very when come here just like long make many more only over such take than them
well were what about after again below could every first found great house large learn never other place plant
point right small sound spell still study their there these thing think three water where which world would write
answer before better change during enough follow letter little mother moving number people picture should another
because between country example thought through together important different following sentence something
meeting tomorrow deploy customer invoice question release schedule delivery morning afternoon thank
"""
WORDS = VOCABULARY.split()
WEIGHTS = [1 / (rank + 3) for rank in range(len(WORDS))]
ACCENTS = ("é", "ß", "ж", "語", "漢", "🜁", "naïve ", "Größe ", "слово ", "\N{ZERO WIDTH JOINER}")


def prose(seed: object, size: int) -> str:
    """Exactly ``size`` characters, all of them ASCII and none that JSON escapes."""
    dice = random.Random(str(seed))
    text = " ".join(dice.choices(WORDS, WEIGHTS, k=size // 2 + 1))
    while len(text) < size:
        text += " " + prose(f"{seed}, more", size)
    return text[:size]


def digits(seed: object, size: int) -> str:
    """Exactly ``size`` digits, base sixteen: quickly made, and hardly to be compressed to less than half."""
    return random.Random(str(seed)).randbytes(size // 2 + 1).hex()[:size]


def message(kind: Kind, seed: object, size: int) -> str | bytes:
    """Exactly ``size`` bytes: text, text of several bytes a letter, bytes that repeat from afar, or noise."""
    dice = random.Random(str(seed))
    if kind == "prose":
        return prose(seed, size)
    if kind == "accents":
        return padded("".join(dice.choices(ACCENTS, k=size)), size)
    if kind == "noise":
        return dice.randbytes(size)
    block = dice.randbytes(dice.choice([3, 40, 500, 3000, 3800, 5000]))  # a window is 4 kB: the last is beyond it
    return (block * (size // len(block) + 1))[:size]


def padded(text: str, size: int) -> str:
    """As much of ``text`` as ``size`` bytes hold, and dots."""
    cut = text.encode()[:size].decode(errors="ignore")
    return cut + "." * (size - len(cut.encode()))
