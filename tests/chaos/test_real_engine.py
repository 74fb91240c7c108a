"""A model with weights whose worker dies in mid-answer: the text is that of a run without faults. The long version of it
is `python -m tests.chaos.real_engine`."""

import pytest
import transformers

from tests.chaos.real_engine import compare, play
from tests.checkpoints import VOCAB_SIZE, save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder, config)
    return str(folder)


async def test_text_goes_on_where_a_dead_worker_left_it(model: str):
    cases = ["sampled", "n=2"]
    found = await play(model, dtype="float32", num_tokens=16, every=10, cases=cases)
    for name, (expected, got) in found.items():
        assert not got.problems and not expected.problems, (name, got.problems)
        assert got.num_deaths, name
        assert compare(expected, got) == "equal", name
    assert len(set(found["n=2"][1].texts)) == 2, "each sequence has a seed of its own"
