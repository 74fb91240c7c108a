"""Galactica's prompts: a marker before every character of a DNA, protein or molecule sequence, so
that each becomes a token. The tokenizer drops the markers. Source: Taylor et al. 2022, and `galai`.
"""

import re

_SEQUENCE = re.compile(r"(\[START_(DNA|AMINO|SMILES|I_SMILES)\])(.*?)(?=\[END_\2\])")
# In two parts, as in the original: should this file become training data, it must not hold it.
SPLIT_MARKER = "SPL1T-TH1S-" + "Pl3A5E"


def mark_sequences(text: str) -> str:
    """`[START_DNA]AC[END_DNA]` with a marker before A, before C and before the end. A sequence ends
    on its line, or is none."""
    return _SEQUENCE.sub(
        lambda match: SPLIT_MARKER.join([match[1], *match[3], ""]),
        text,
    )


def unmarked_offset(marked: str, offset: int) -> int:
    """The place in the text before `mark_sequences`, for a place in the text after it."""
    return offset - len(SPLIT_MARKER) * marked.count(SPLIT_MARKER, 0, offset)
