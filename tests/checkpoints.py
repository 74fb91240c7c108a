"""Tiny random checkpoints as transformers saves them, and a driver that steps an engine by
hand-made plans.

Weights are drawn wide: with the usual small ones, a tied random model repeats its input whatever
its layers compute.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from common.messages import Sampling
from worker.engine.plan import Chunk, KvCacheLayout, Sampled, SequenceStart, StepPlan, StepResult

VOCAB_SIZE = 199  # no multiple of anything
INITIAL_STD = 0.35


def save_checkpoint(folder: Path, config: object, *, seed: int = 0) -> torch.nn.Module:
    """Write a random model of this transformers config with a word tokenizer; the model, in
    float32, is the oracle."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".weight") and parameter.dim() == 1:  # of a norm
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:  # wide biases would say the same whatever the input is
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=INITIAL_STD)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one word for each token id."""
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def random_prompt(length: int, *, seed: int) -> tuple[int, ...]:
    """A prompt without the ids 0 to 2, which are special."""
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))


def greedy_oracle(
    model: torch.nn.Module, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities from transformers' `generate`; never ends early."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logprobs = [
        step[0].log_softmax(-1)[token].item()
        for step, token in zip(out.logits, tokens, strict=True)
    ]
    return tokens, logprobs


def prompt_logprob_oracle(model: torch.nn.Module, prompt: Sequence[int]) -> list[float]:
    """Log-probability of every prompt token but the first."""
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]


@dataclass
class Driven:
    """A sequence as the driver sees it."""

    slot: int
    prompt: tuple[int, ...]
    num_tokens: int
    chunk_size: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: dict[int, float] = field(default_factory=dict)
    num_cached: int = 0
    num_blocks: int = 0
    shared_blocks: tuple[int, ...] = ()  # a prefix that another sequence has computed
    wants_prompt_logprobs: bool = False
    is_started: bool = False

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.num_tokens

    @property
    def all_tokens(self) -> tuple[int, ...]:
        return self.prompt + tuple(self.tokens)


class Driver:
    """Steps an engine as a scheduler would, with blocks handed out in a shuffled order."""

    def __init__(self, engine: object, *, seed: int = 0) -> None:
        self.engine = engine
        self.layout: KvCacheLayout = engine.layout
        self.free = list(range(self.layout.num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.step = 0

    def run(self, sequences: Iterable[Driven]) -> list[StepResult]:
        """Run all to their ends, each chunking its prompt by its own size; then release their
        slots."""
        live = list(sequences)
        results = []
        while any(not sequence.is_done for sequence in live):
            running = [sequence for sequence in live if not sequence.is_done]
            running.sort(key=lambda sequence: not sequence.tokens)
            results.append(self._step(running))
        slots = tuple(sequence.slot for sequence in live)
        self.engine.step(StepPlan(self.step, (), released=slots))
        return results

    def _step(self, running: Sequence[Driven]) -> StepResult:
        started = [self._start(sequence) for sequence in running if not sequence.is_started]
        chunks = tuple(self._chunk(sequence) for sequence in running)
        result = self.engine.step(StepPlan(self.step, chunks, tuple(started)))
        self.step += 1
        by_slot = {sequence.slot: sequence for sequence in running}
        assert [s.slot for s in result.sampled] == [c.slot for c in chunks if c.is_sampled]
        for sampled in result.sampled:
            self._record(by_slot[sampled.slot], sampled)
        for scored in result.prompt_logprobs:
            for offset, logprob in enumerate(scored.logprobs):
                by_slot[scored.slot].prompt_logprobs[scored.start + offset] = logprob
        return result

    def _start(self, sequence: Driven) -> SequenceStart:
        sequence.is_started = True
        sequence.num_cached = len(sequence.shared_blocks) * self.layout.block_size
        self.tables[sequence.slot] = []
        return SequenceStart(
            sequence.slot,
            sequence.prompt,
            (),
            Sampling(),
            prompt_logprobs=sequence.wants_prompt_logprobs,
        )

    def _chunk(self, sequence: Driven) -> Chunk:
        start = sequence.num_cached
        tokens = sequence.all_tokens[start : start + sequence.chunk_size]
        end = start + len(tokens)
        table = self.tables[sequence.slot]
        new = list(sequence.shared_blocks) if not table else []
        while (len(table) + len(new)) * self.layout.block_size < end:
            new.append(self.free.pop())
        table += new
        sequence.num_cached = end
        is_sampled = end == len(sequence.all_tokens)
        return Chunk(sequence.slot, start, tokens, tuple(new), is_sampled)

    @staticmethod
    def _record(sequence: Driven, sampled: Sampled) -> None:
        sequence.tokens.append(sampled.token)
        sequence.logprobs.append(sampled.logprob)
