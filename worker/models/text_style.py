"""What is special about the text of a family: how its prompts are prepared, what its answers show.

It reaches gateways by the model card; TGI knows the same of Galactica and SantaCoder by their names.
"""

import logging
from dataclasses import replace

from tokenizers import AddedToken, Tokenizer

from worker.models.config import ServedConfig
from worker.weights.tokenizer_files import TokenizerFiles

GALACTICA = "galactica"  # a prompt style; `gateway/galactica.py` has what it means
# SantaCoder's files may lack these, or have them as plain tokens: its users were told to add them,
# in this order, which gives them the ids that it was trained with.
FILL_IN_THE_MIDDLE = ("<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>")

log = logging.getLogger(__name__)


def with_text_style(texts: TokenizerFiles, config: ServedConfig) -> TokenizerFiles:
    """The tokenizer as the model needs it, with what else a gateway must know; for nearly all
    models that is nothing."""
    if config.architecture == "OPTForCausalLM" and _has(texts, "[START_DNA]"):
        return replace(texts, prompt_style=GALACTICA, keeps_special_tokens=True)
    is_santacoder = config.architecture == "GPT2LMHeadCustomModel" or (
        config.architecture == "GPTBigCodeForCausalLM" and _has(texts, "<fim-prefix>")
    )
    if not is_santacoder:
        return texts
    made = _with_fill_in_the_middle(texts.tokenizer_json, config.vocab_size)
    return replace(texts, tokenizer_json=made, keeps_special_tokens=True)


def _has(texts: TokenizerFiles, token: str) -> bool:
    return Tokenizer.from_str(texts.tokenizer_json).token_to_id(token) is not None


def _with_fill_in_the_middle(tokenizer_json: str, vocab_size: int) -> str:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in FILL_IN_THE_MIDDLE])
    if tokenizer.get_vocab_size() > vocab_size:
        log.warning("the embedding has no rows for %s: left out", ", ".join(FILL_IN_THE_MIDDLE))
        return tokenizer_json
    return tokenizer.to_str()
