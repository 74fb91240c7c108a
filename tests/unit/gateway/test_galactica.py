"""Galactica's sequences are marked before they are tokenized, and nobody sees the marks."""

import re
import time
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from common.messages import Frame, GenerationRequest, Token
from gateway.galactica import SPLIT_MARKER, mark_sequences, unmarked_places

M = SPLIT_MARKER


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("[START_DNA]ACG[END_DNA]", f"[START_DNA]{M}A{M}C{M}G{M}[END_DNA]"),
        ("[START_I_SMILES]C=O[END_I_SMILES]", f"[START_I_SMILES]{M}C{M}={M}O{M}[END_I_SMILES]"),
        (
            "a [START_AMINO]MV[END_AMINO] b [START_SMILES]C[END_SMILES]",
            f"a [START_AMINO]{M}M{M}V{M}[END_AMINO] b [START_SMILES]{M}C{M}[END_SMILES]",
        ),
        ("[START_DNA][END_DNA]", f"[START_DNA]{M}[END_DNA]"),
    ],
)
def test_every_character_of_a_sequence_is_marked(text: str, marked: str):
    assert mark_sequences(text) == marked


@pytest.mark.parametrize(
    "text",
    [
        "no sequence",
        "[START_DNA]ACG",
        "[START_DNA]ACG[END_AMINO]",
        "[START_DNA]AC\nG[END_DNA]",
        "[START_REF]ACG[END_REF]",
    ],
)
def test_everything_else_stays(text: str):
    assert mark_sequences(text) == text


def test_places_in_the_marked_text_are_places_in_the_text():
    text = "x [START_DNA]ACG[END_DNA] y"
    marked = mark_sequences(text)
    unmarked = unmarked_places(marked)
    for character in "xy":
        assert unmarked(marked.index(character)) == text.index(character)
    for character in "ACG":
        assert unmarked(marked.index(f"{M}{character}") + len(M)) == text.index(f"{character}", 12)


_PIECES = st.sampled_from(
    ["[START_DNA]", "[END_DNA]", "[START_SMILES]", "[END_SMILES]", "[START_I_SMILES]", "A", "\n"]
)


@given(st.lists(_PIECES, max_size=12).map("".join))
def test_sequences_are_those_of_the_original_expression(text: str):
    original = re.compile(r"(\[START_(DNA|AMINO|SMILES|I_SMILES)\])(.*?)(?=\[END_\2\])")
    expected = original.sub(lambda match: M.join([match[1], *match[3], ""]), text)
    assert mark_sequences(text) == expected


def test_starts_without_an_end_do_not_each_look_for_it():
    text = "[START_DNA]" * 100_000
    began_s = time.process_time()
    assert mark_sequences(text) == text
    assert time.process_time() - began_s < 5, "it was minutes"


def marker_dropping_tokenizer() -> bytes:
    """Words of letters; the marker is a border and no token, as in Galactica's tokenizer.json."""
    words = ["[UNK]", "ACG", "A", "C", "G", "[START_DNA]", "[END_DNA]", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.add_special_tokens(["[START_DNA]", "[END_DNA]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(M, "removed"),
            pre_tokenizers.Split(Regex(r"\s"), "removed"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str().encode()


@pytest.fixture
def galactica(fleet):
    card = replace(
        fleet.registry.cards["tiny"],
        tokenizer_digest="galactica",
        prompt_style="galactica",
        keeps_special_tokens=True,
    )
    fleet.registry.cards["tiny"] = card
    fleet.registry.tokenizers["galactica"] = marker_dropping_tokenizer()
    return fleet


PROMPT = "ACG is [START_DNA]ACG[END_DNA]"


async def test_a_prompt_is_marked_on_its_way_to_the_model(galactica, client):
    await client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 2}})
    assert galactica.requests[0].prompt_tokens == (1, 7, 5, 2, 3, 4, 6)


async def test_tokenize_tells_places_in_the_prompt_as_it_came(galactica, client):
    response = await client.post("/tokenize", json={"inputs": PROMPT})
    rows = await response.json()
    assert [row["text"] for row in rows] == ["ACG", "is", "[START_DNA]", "A", "C", "G", "[END_DNA]"]
    assert all(PROMPT[row["start"] : row["stop"]] == row["text"] for row in rows)


@pytest.mark.parametrize("keeps", [True, False])
async def test_special_tokens_stay_in_the_text_where_the_card_says_so(
    galactica, client, frames_of, keeps: bool
):
    card = galactica.registry.cards["tiny"]
    galactica.registry.cards["tiny"] = replace(card, keeps_special_tokens=keeps)
    await client.services.directory.refresh()

    def answer(request: GenerationRequest) -> list[Frame]:
        first, last = frames_of(request.id, ["A", "C"])
        special = (Token(5, "[START_DNA]", -0.5, is_special=True), Token(11, "C", -0.5))
        return [first, msgspec.structs.replace(last, tokens=special)]

    galactica.answer = answer
    body = {"inputs": "is", "parameters": {"max_new_tokens": 3}}
    response = await client.post("/generate", json=body)
    text = "A[START_DNA]C" if keeps else "AC"
    assert (await response.json())["generated_text"] == text
    stream = await client.post("/generate_stream", json=body)
    assert f'"generated_text":"{text}"' in (await stream.text())


async def test_a_style_of_a_newer_worker_is_not_served(galactica, client):
    card = galactica.registry.cards["tiny"]
    galactica.registry.cards["tiny"] = replace(card, prompt_style="newer")
    await client.services.directory.refresh()
    assert client.services.directory.models == []
