"""Galactica's prompts: a marker before every character of a DNA, protein or molecule sequence, so
that each becomes a token. The tokenizer drops the markers. Source: Taylor et al. 2022, and `galai`.
"""

import re
from bisect import bisect_right
from collections.abc import Callable

_TAG = re.compile(r"\[(START|END)_(DNA|AMINO|SMILES|I_SMILES)\]|\n")
# In two parts, as in the original: should this file become training data, it must not hold it.
SPLIT_MARKER = "SPL1T-TH1S-" + "Pl3A5E"


def mark_sequences(text: str) -> str:
    """`[START_DNA]AC[END_DNA]` with a marker before A, before C and before the end. A sequence ends
    on its line, or is none."""
    parts, done = [], 0
    for start, end in _sequences(text):
        if start > done:  # else it stands within a sequence
            parts += [text[done:start], SPLIT_MARKER.join(["", *text[start:end], ""])]
            done = end
    return "".join((*parts, text[done:]))


def unmarked_places(marked: str) -> Callable[[int], int]:
    """For places in the text after `mark_sequences`: the same place in the text before it."""
    ends = [found.end() for found in re.finditer(SPLIT_MARKER, marked)]
    return lambda place: place - len(SPLIT_MARKER) * bisect_right(ends, place)


def _sequences(text: str) -> list[tuple[int, int]]:
    """Where what follows a start begins, and where it ends. One pass from the end, because a client
    may send many starts without an end, and none of them should look for it."""
    found: list[tuple[int, int]] = []
    next_ends: dict[str, int] = {}  # on this line, by kind
    for tag in reversed(list(_TAG.finditer(text))):
        if tag[0] == "\n":
            next_ends.clear()
        elif tag[1] == "END":
            next_ends[tag[2]] = tag.start()
        elif tag[2] in next_ends:
            found.append((tag.end(), next_ends[tag[2]]))
    return found[::-1]
