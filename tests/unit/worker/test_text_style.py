"""Galactica and SantaCoder are known by their tokenizers; other models of their shape are plain."""

from dataclasses import dataclass, replace

import pytest
from tokenizers import Tokenizer, models

from worker.models.text_style import FILL_IN_THE_MIDDLE, with_text_style
from worker.weights.tokenizer_files import TokenizerFiles


@dataclass
class Config:
    architecture: str
    vocab_size: int = 20


def files(*extra: str) -> TokenizerFiles:
    words = [f"w{index}" for index in range(10)]
    vocabulary = {word: index for index, word in enumerate((*words, *extra))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return TokenizerFiles(tokenizer.to_str(), "", "", "")


def special_ids(texts: TokenizerFiles) -> dict[str, int]:
    added = Tokenizer.from_str(texts.tokenizer_json).get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def test_galactica_is_an_opt_with_sequence_markers() -> None:
    texts = files("[START_DNA]")
    styled = with_text_style(texts, Config("OPTForCausalLM"))
    assert styled == replace(texts, prompt_style="galactica", keeps_special_tokens=True)
    assert with_text_style(files(), Config("OPTForCausalLM")) == files()
    assert with_text_style(texts, Config("LlamaForCausalLM")) == texts


def test_the_original_santacoder_gets_its_tokens_in_the_order_of_their_ids() -> None:
    styled = with_text_style(files(), Config("GPT2LMHeadCustomModel"))
    expected = {text: 10 + index for index, text in enumerate(FILL_IN_THE_MIDDLE)}
    assert special_ids(styled) == expected
    assert styled.keeps_special_tokens and styled.prompt_style == ""
    encoded = Tokenizer.from_str(styled.tokenizer_json).encode("<fim-prefix><fim-suffix>")
    assert encoded.ids == [11, 13]


def test_tokens_that_are_there_keep_their_ids_and_become_special() -> None:
    styled = with_text_style(files(*reversed(FILL_IN_THE_MIDDLE)), Config("GPTBigCodeForCausalLM"))
    expected = {text: 14 - index for index, text in enumerate(FILL_IN_THE_MIDDLE)}
    assert special_ids(styled) == expected
    assert styled.keeps_special_tokens


def test_starcoder_spells_them_otherwise_and_is_plain() -> None:
    texts = files("<fim_prefix>")
    assert with_text_style(texts, Config("GPTBigCodeForCausalLM")) == texts


def test_no_token_is_made_that_the_model_has_no_row_for(caplog: pytest.LogCaptureFixture) -> None:
    styled = with_text_style(files(), Config("GPT2LMHeadCustomModel", vocab_size=14))
    assert special_ids(styled) == {}
    assert "no rows for" in caplog.text
