"""What the scheduler tells an engine to do in one step, and what the engine answers. No torch.

A plan is a difference: an engine keeps, per slot, the block table and the sampling state of the sequence that lives
there. Rank 0 sends the same plan to every shard. Order within a plan: released, then started, then the chunks.

    block table of a slot, block size 4:   [ 7 | 2 | 9 ]      position p lives in block table[p // 4], at p % 4
    positions                               0-3 4-7 8-11
"""

from dataclasses import dataclass

from common.messages import Failure, Sampling

# A `Sampled` whose logits were broken: fail this sequence, the others of the step are sound.
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class KvCacheLayout:
    """Discovered when an engine is built: how much fits."""

    num_blocks: int
    block_size: int  # tokens
    num_slots: int  # sequences that may run at once

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence takes a slot: for the first time, or again after a preemption or on another worker.

    In an encoder-decoder model the request's prompt is `encoder_tokens`, and `prompt_tokens` is what the decoder
    begins with: its start token. The encoder runs over all of them in the step that starts the sequence, before any
    chunk, and what the decoder attends to of them is kept in `encoder_blocks` as long as the sequence has its slot.
    """

    slot: int
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[
        int, ...
    ]  # generated before; penalties and the sampler's position count them
    sampling: Sampling
    min_new_tokens: int = 0  # end-of-sequence tokens are masked before this many
    prompt_logprobs: bool = False
    encoder_tokens: tuple[int, ...] = ()
    encoder_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence to run in this step: a part of its prompt, or its newest token.

    `new_blocks` are appended to the slot's block table first. A first chunk may bring blocks that already hold
    keys and values (prefix hits): then `start` is the first position that is not cached.
    """

    slot: int
    start: int  # position of the first token
    tokens: tuple[int, ...]
    new_blocks: tuple[int, ...]
    is_sampled: (
        bool  # choose a next token from the last position (false for all but a prompt's last chunk)
    )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Decoding sequences come first among the chunks."""

    step: int
    chunks: tuple[Chunk, ...]
    started: tuple[SequenceStart, ...] = ()
    released: tuple[int, ...] = ()  # slots whose sequences ended or were preempted

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model, or through its encoder."""
        num_encoder_tokens = sum(len(start.encoder_tokens) for start in self.started)
        return num_encoder_tokens + sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for a slot; log-probabilities are natural logarithms after all sampling rules.

    `NO_TOKEN`, with a NaN log-probability, says that there is none: `failure` tells why, or the
    model's logits were broken.
    """

    slot: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), most likely first, ties included
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Raw log-probabilities of prompt tokens: `logprobs[i]` belongs to the token at position `start + i`."""

    slot: int
    start: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `Sampled` for each chunk that asked for it, in the order of the chunks."""

    step: int
    sampled: tuple[Sampled, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
