"""The demo model, for real: our greedy tokens are those of transformers on the same weights.

In float32 they must be equal. In bfloat16 logits are so coarse (steps of 1/8 near 20) that two tokens often share the
highest one, and then the order of additions decides; so there are two sets of prompts. Where transformers is decided,
its first choice at least two such steps ahead of the second at every token, ours must be equal. Elsewhere each token
must be one that transformers puts first given the same text, or within two steps of it.

Of 140 questions, on a Zen 4: transformers changes 23 answers of 12 tokens between a request alone and a padded batch of
16, where its lead was 0 to 0.25; ours differ from it in 20 alone and 19 in a batch, where it was 0 or 0.125.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.checkpoints import greedy_oracle
from tests.parity import run_scheduled
from worker.engine.engine import build_engine
from worker.engine.loaded import Engine
from worker.settings import WorkerSettings
from worker.weights.demo_model import fetch_demo_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_TOKENS = 12
TIE = 2 * 2**-3  # two steps of bfloat16 for logits from 16 to 32
# Found among 126 questions by transformers' lead alone, 0.5 and more; ours were not asked.
DECIDED = (
    "What is the capital of France? Answer with one word.",
    "What is the capital of Greece? Answer with one word.",
    "What is the capital of Germany? Answer with one word.",
    "Complete the sentence: The capital of Japan is",
    "Who was the first president of the United States?",
    "Write a letter to my landlord about a broken heater.",
    "Write an email to my boss asking for a day off.",
    "What is gravity?",
    "Repeat after me: the quick brown fox jumps over the lazy dog.",
    "What is the tallest mountain in the world?",
    "Which language do people speak in China?",
    "Summarise this text: " + "The sea was calm and the ship sailed on. " * 5,
    "Summarise this text: " + "Cats sleep most of the day. Dogs like to play. " * 4,
    "What is the speed of light?",
    "Who wrote Romeo and Juliet?",
    "Name the five senses.",
    "Finish the sentence: To be, or not to be,",
    "Write a hello world program in C.",
    "What is the opposite of hot?",
    "Say hello.",
)
OPEN = (
    "What is the capital of France?",
    "Name three colours.",
    "Hello!",
    "Write a haiku about the sea.",
    "How many legs does a spider have?",
    "Translate 'good morning' into Spanish.",
    "What is 12 + 30?",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Explain gravity to a child.",
    "List the days of the week.",
    "What does a baker do?",
    "Is water wet?",
    "Tell me a joke about cats.",
    "Why is the sky blue? Answer in one sentence, please, and use no difficult words at all.",
    "def fibonacci(n):",
    "Summarise: " + "The quick brown fox jumps over the lazy dog. " * 6,
    "Continue this list: one, two, three, four, five, six, seven, eight, nine,",
    "🙂 What does this face mean?",
    "Was ist die Hauptstadt von Österreich?",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_demo_model(Path(__file__).parents[2] / ".models")


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts, as tokens."""

    prompts: list[tuple[int, ...]]
    is_decided: bool


@pytest.fixture(scope="module", params=["decided", "open"])
def asked(request: pytest.FixtureRequest, folder: Path) -> Asked:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    is_decided = request.param == "decided"
    texts = [turn.format(question) for question in (DECIDED if is_decided else OPEN)]
    return Asked([tuple(tokenizer.encode(text).ids) for text in texts], is_decided)


class Pair:
    """Both sides of one number format, and what transformers generates."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.dtype = dtype
        self.oracle = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        settings = WorkerSettings(
            model_id=str(folder), dtype=dtype, max_batch_size=16, max_total_tokens=512
        )
        self.engine: Engine = build_engine(settings).engine
        self._expected: dict[tuple[int, ...], list[int]] = {}

    def expected(self, prompt: tuple[int, ...]) -> list[int]:
        """What transformers generates."""
        if prompt not in self._expected:
            self._expected[prompt] = greedy_oracle(self.oracle, prompt, NUM_TOKENS)[0]
        return self._expected[prompt]

    def lead(self, prompt: tuple[int, ...]) -> float:
        """How far transformers' first choice is ahead of its second, at the token where it is least."""
        logits = self._logits(prompt, self.expected(prompt))
        first, second = logits.topk(2).values.unbind(-1)
        return float((first - second).min())

    def check(self, asked: Asked, answers: list[list[int]]) -> list[str]:
        """Assert that the answers are right; the near-ties that were needed, in words."""
        ties = []
        for prompt, answer in zip(asked.prompts, answers, strict=True):
            expected = self.expected(prompt)
            if answer != expected:
                assert self.dtype == "bfloat16" and not asked.is_decided, (answer, expected)
                ties += self._ties(prompt, answer)
        return ties

    def _ties(self, prompt: tuple[int, ...], answer: list[int]) -> list[str]:
        logits = self._logits(prompt, answer)
        found = []
        for step, token in enumerate(answer):
            best = int(logits[step].argmax())
            gap = float(logits[step, best] - logits[step, token])
            assert gap <= TIE, f"token {step} of {answer}: {token} is {gap} below {best}"
            if token != best:
                found.append(f"token {step}: {token} for {best}, {gap} below")
        return found

    @torch.inference_mode()
    def _logits(self, prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
        """Those that each token of `answer` was chosen from, `[tokens, vocabulary]`."""
        return self.oracle(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[Pair]:
    pair = Pair(folder, request.param)
    yield pair
    pair.engine.close()


def answers_of(
    engine: Engine, prompts: list[tuple[int, ...]], max_step_tokens: int
) -> list[list[int]]:
    done, _ = run_scheduled(engine, prompts, max_step_tokens=max_step_tokens, num_tokens=NUM_TOKENS)
    return [one.tokens for one in done]


def test_transformers_is_decided_where_we_say_so(pair: Pair, asked: Asked) -> None:
    leads = [pair.lead(prompt) for prompt in asked.prompts]
    assert (min(leads) >= TIE) == asked.is_decided, leads


def test_alone(pair: Pair, asked: Asked, capsys: pytest.CaptureFixture) -> None:
    answers = [answers_of(pair.engine, [prompt], 512)[0] for prompt in asked.prompts]
    tell(capsys, pair, "alone", pair.check(asked, answers))


def test_in_a_mixed_batch(pair: Pair, asked: Asked, capsys: pytest.CaptureFixture) -> None:
    answers = answers_of(pair.engine, asked.prompts, 48)  # 16 at once, and prompts in chunks
    tell(capsys, pair, "in a batch of 16", pair.check(asked, answers))


def test_with_prefix_hits(pair: Pair, asked: Asked, capsys: pytest.CaptureFixture) -> None:
    done, scheduler = run_scheduled(
        pair.engine, asked.prompts * 2, max_step_tokens=256, num_tokens=NUM_TOKENS
    )
    assert scheduler.num_prefix_hit_tokens > 0
    answers, num = [one.tokens for one in done], len(asked.prompts)
    ties = pair.check(asked, answers[:num]) + pair.check(asked, answers[num:])
    tell(capsys, pair, "with prefix hits", ties)


def tell(capsys: pytest.CaptureFixture, pair: Pair, how: str, ties: list[str]) -> None:
    if ties:
        with capsys.disabled():
            print(f"\n{pair.dtype} {how}: {len(ties)} near-ties: {'; '.join(ties)}")
