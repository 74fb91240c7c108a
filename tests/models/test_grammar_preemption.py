"""A text that follows a grammar is the same after a preemption: what was generated is replayed."""

import re

import pytest
import transformers

from common.messages import Grammar, GrammarKind, Sampling
from tests.checkpoints import random_prompt, save_checkpoint
from tests.parity import run_scheduled
from worker.engine.echo import END_TOKEN, VOCAB_SIZE, echo_tokenizer_json
from worker.engine.engine import build_engine
from worker.settings import WorkerSettings

PATTERN = r"[a-f]{8,16}(-[0-9]{3}){2,4}"
GRAMMAR = Sampling(grammar=Grammar(GrammarKind.REGEX, PATTERN))
PROMPTS = tuple(random_prompt(length, seed=length) for length in (5, 17, 9, 12))
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("bytes")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=END_TOKEN,
    )
    save_checkpoint(folder, config)
    (folder / "tokenizer.json").write_text(echo_tokenizer_json())
    values = dict(model_id=str(folder), device="cpu", dtype="float32", threads=1, block_size=4)
    return values | dict(max_total_tokens=64, max_batch_size=4)


def texts(settings: dict[str, object], *, is_preempted: bool) -> list[str]:
    """Every prompt's answer up to its end; what follows that is the end again."""
    engine = build_engine(WorkerSettings(**settings)).engine
    told, scheduler = run_scheduled(
        engine, PROMPTS, max_step_tokens=32, num_tokens=NUM_TOKENS, sampling=GRAMMAR
    )
    assert (scheduler.num_preemptions > 0) == is_preempted
    answers = []
    for one in told:
        end = one.tokens.index(END_TOKEN)
        assert set(one.tokens[end:]) == {END_TOKEN}
        answers.append(bytes(one.tokens[:end]).decode())
    return answers


def test_the_text_goes_on_where_it_was(settings: dict[str, object]) -> None:
    expected = texts(settings, is_preempted=False)
    assert len(set(expected)) > 1
    assert all(re.fullmatch(PATTERN, text) for text in expected)
    assert texts(settings | {"max_batch_total_tokens": 64}, is_preempted=True) == expected
