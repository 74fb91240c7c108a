"""Incremental decode with small tokenizers of each kind, trained or spelled out here."""

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from worker.text.detokenizer import Detokenizer
from worker.text.pieces import Pieces

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café 😀👍 日本語 テスト",
    "  two  spaces\n\n",
] * 5
TEXTS = [
    "hello world",
    "  leading and   inner spaces ",
    "emoji 😀😀👍🏽 done",
    "family 👩‍👩‍👧‍👦 of four",
    "日本語のテキスト、漢字",
    "combining e\u0301 o\u0308\u0323 and नमस्ते",
    "a \ufffd that is meant",
    "\n\ttabs\n",
]


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "日本"])
    return tokenizer


def byte_fallback():
    """As Llama 2: SentencePiece BPE with <0xNN> tokens, decoded by four rules."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz日本語é", "\ufffd", "th", "▁th", "he", "▁the", "▁a"]
    merges = [("t", "h"), ("▁", "th"), ("h", "e"), ("▁th", "e"), ("▁", "a")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram():
    """As T5."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({char for text in TEXTS for char in text if not char.isspace()})
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unknown_to_us():
    """Bytes behind a decoder that is not recognised: held back by what the text looks like."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


TOKENIZERS = {kind.__name__: kind() for kind in (byte_level, byte_fallback, unigram, unknown_to_us)}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)
KINDS = st.sampled_from(sorted(TOKENIZERS))


def deltas(tokenizer, tokens, prompt=(), **options):
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@kinds
@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_are_the_whole(kind, text):
    tokenizer = TOKENIZERS[kind]
    tokens = encode(tokenizer, text)
    assert "".join(deltas(tokenizer, tokens)) == tokenizer.decode(tokens)


@kinds
@given(text=st.text(max_size=30), prompt=st.text(max_size=10))
@example(text="😀 a", prompt="")
@example(text="a", prompt="x\ufffd")
def test_an_answer_continues_its_prompt(kind, text, prompt):
    tokenizer = TOKENIZERS[kind]
    before, after = encode(tokenizer, prompt), encode(tokenizer, text)
    whole = tokenizer.decode(before + after)
    assert tokenizer.decode(before) + "".join(deltas(tokenizer, after, before)) == whole


@given(text=st.text(max_size=30))
def test_a_replacement_character_is_never_a_half_character(text):
    """Text without U+FFFD shows none on its way, and what is shown is always a beginning of it."""
    text = text.replace("\ufffd", "")
    for kind in ("byte_level", "byte_fallback", "unknown_to_us"):
        tokenizer = TOKENIZERS[kind]
        tokens = encode(tokenizer, text)
        parts = deltas(tokenizer, tokens)
        assert "\ufffd" not in "".join(parts) and parts[-1] == ""
        assert "".join(parts) == tokenizer.decode(tokens)


@given(tokens=st.lists(st.integers(0, 340), max_size=30))
def test_byte_level_decodes_any_tokens_as_the_tokenizer_does(tokens):
    tokenizer = TOKENIZERS["byte_level"]
    assert "".join(deltas(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(
    data=st.lists(
        st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xED, 0xA0, 0x41, 0x20]), max_size=12
    )
)
@example(data=[0x20, 0x41])
@example(data=[0xF0, 0x9F, 0x98, 0x80, 0xF0, 0x41])
def test_invalid_bytes_of_byte_fallback_spare_valid_characters(data):
    """Each maximal invalid part is one U+FFFD; a first space is stripped, as always."""
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    expected = bytes(data).decode(errors="replace").removeprefix(" ")
    assert "".join(deltas(tokenizer, tokens)) == expected


def test_text_after_half_a_character_ends_it():
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [tokenizer.token_to_id(piece) for piece in ("a", "<0xF0>", "<0x9F>", "▁the", "b")]
    assert deltas(tokenizer, tokens) == ["a", "", "", "\ufffd the", "b", ""]


def test_a_decoder_that_changes_its_mind_repeats_nothing():
    vocab = {"do": 0, "n't": 1, ".": 2, "[UNK]": 3}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    assert "".join(deltas(tokenizer, [0, 1, 2, 0])) == tokenizer.decode([0, 1, 2, 0]) == "don't. do"


@kinds
@given(data=st.data())
def test_a_replay_gives_the_same_parts(kind, data):
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=20))
    assert deltas(tokenizer, tokens) == deltas(tokenizer, tokens)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unknown_to_us"])
def test_endless_invalid_bytes_come_out_at_once(kind):
    tokenizer = TOKENIZERS[kind]
    piece = "<0x80>" if kind == "byte_fallback" else "Ģ"
    detokenizer = Detokenizer(tokenizer, [])
    token = tokenizer.token_to_id(piece)
    shown = 0
    for pushed in range(1, 200):
        shown += len(detokenizer.push(token))
        assert pushed - shown < 8
    assert len(detokenizer.flush()) == 199 - shown


@kinds
def test_special_tokens_are_left_out_or_named(kind):
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.token_to_id("</s>")
    tokens = [*encode(tokenizer, "the a"), end]
    assert "".join(deltas(tokenizer, tokens)) == "the a"
    assert "".join(deltas(tokenizer, tokens, skip_special_tokens=False)).endswith("</s>")


def test_the_first_space_is_kept_only_after_a_prompt():
    for kind in ("byte_fallback", "unigram"):
        tokenizer = TOKENIZERS[kind]
        prompt, answer = encode(tokenizer, "a"), encode(tokenizer, "the")
        assert "".join(deltas(tokenizer, answer, prompt)) == " the"
        assert "".join(deltas(tokenizer, answer)) == "the"
        end = tokenizer.token_to_id("</s>")
        assert "".join(deltas(tokenizer, answer, [*prompt, end])) == " the"
        assert "".join(deltas(tokenizer, answer, [end])) == "the"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unknown_to_us"])
def test_a_character_that_the_prompt_leaves_open_is_told_whole(kind):
    tokenizer = TOKENIZERS[kind]
    names = [f"<0x{b:02X}>" for b in "😀".encode()] if kind == "byte_fallback" else "ðŁĺĢ"
    tokens = [tokenizer.token_to_id(name) for name in names]
    assert deltas(tokenizer, tokens[2:], encode(tokenizer, "a") + tokens[:2]) == ["", "😀", ""]


def test_padding_of_the_vocabulary_has_no_text():
    for tokenizer in TOKENIZERS.values():
        assert deltas(tokenizer, [tokenizer.get_vocab_size() + 100]) == ["", ""]


def test_single_tokens_have_the_text_they_have_in_the_middle():
    pieces = Pieces(TOKENIZERS["byte_fallback"])
    texts = {
        name: pieces.text_of(pieces.tokenizer.token_to_id(name))
        for name in ("▁the", "</s>", "<0x80>")
    }
    assert texts == {"▁the": " the", "</s>": "</s>", "<0x80>": "\ufffd"}
    pieces = Pieces(TOKENIZERS["byte_level"])
    assert pieces.text_of(pieces.tokenizer.token_to_id("<tool>")) == "<tool>"
    assert pieces.text_of(10**6) == ""
