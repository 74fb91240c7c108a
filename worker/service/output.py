"""From sampled ids to frames: text, log-probabilities, ends. Knows neither Redis nor torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import tokenizers

from common.errors import GenerationFailed
from common.messages import Failure, Finish, FinishReason, Frame, Token, TopToken, next_chain
from worker.engine.plan import NO_TOKEN, PromptLogprobs, Sampled, StepPlan, StepResult
from worker.engine.sequence import Sequence
from worker.text.detokenizer import Detokenizer
from worker.text.pieces import Pieces
from worker.text.stopping import StopMatcher, finish_reason


@dataclass(frozen=True, slots=True)
class Output:
    """What a step added: a token, and the frame that tells it, `index` of the journal.

    The token is `NO_TOKEN` when the model failed on the sequence; the frame then holds the failure.
    """

    sequence: Sequence
    token_id: int
    frame: Frame
    index: int


class OutputProcessor:
    """Turns step results into frames; all state lives in the sequences.

    The texts of a journal's tokens that are not special, joined, are the generated text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_tokens: frozenset[int],
        special_tokens: frozenset[int],
        continues_prompt: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """End-of-sequence tokens count as special; an encoder-decoder's text stands alone."""
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._eos_tokens = frozenset(eos_tokens)
        self._special_tokens = self._eos_tokens | special_tokens
        self._continues_prompt = continues_prompt
        self._clock = clock

    def start(self, sequence: Sequence) -> None:
        """Prepare a sequence for `advance`; replays the text of one that another worker began.

        Raises GenerationFailed if the replay does not give the text that clients have already seen.
        """
        request = sequence.request
        prompt = sequence.prompt_tokens if self._continues_prompt else ()
        sequence.detokenizer = Detokenizer(self._tokenizer, prompt, pieces=self._pieces)
        sequence.stop_matcher = StopMatcher(
            request.stopping.stop, include_stop=request.stopping.include_stop
        )
        if sequence.wants_prompt_logprobs:
            sequence.prompt_logprobs = [None] * len(sequence.prompt_tokens)
        replayed = "".join(self._next_text(sequence, token)[0] for token in sequence.output_tokens)
        if sequence.journaled_text not in (None, replayed):
            raise GenerationFailed(
                "This worker decodes the tokens generated so far to another text than the one "
                "already sent: all workers of a model must run the same tokenizer. "
                "Send the request again"
            )

    def advance(
        self,
        plan: StepPlan,
        result: StepResult,
        sequence_at: Callable[[int], Sequence | None],
    ) -> list[Output]:
        """The outputs of a step, in the order of its samples.

        `sequence_at` finds a slot's sequence (`Scheduler.sequence_at`); those that were dropped
        meanwhile are left out. Call it once for each step and commit its outputs: chain and text of
        the sequences move on.
        """
        assert result.step == plan.step, f"result of step {result.step} for plan {plan.step}"
        for rows in result.prompt_logprobs:
            sequence = sequence_at(rows.slot)
            if sequence is not None and sequence.prompt_logprobs:
                _store_prompt_logprobs(sequence, rows)
        now = self._clock()
        pairs = ((sequence_at(sampled.slot), sampled) for sampled in result.sampled)
        return [self._output(sequence, sampled, now) for sequence, sampled in pairs if sequence]

    def _output(self, sequence: Sequence, sampled: Sampled, now: float) -> Output:
        if sampled.token == NO_TOKEN:
            return _failed(sequence, sampled.failure)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        text, is_stopped = self._next_text(sequence, sampled.token)
        num_generated = len(sequence.output_tokens) + 1
        reason = finish_reason(
            sequence.request.stopping,
            token=sampled.token,
            num_generated=num_generated,
            is_stopped=is_stopped,
            eos_tokens=self._eos_tokens,
        )
        if reason and not is_stopped:
            rest, is_stopped = _flush(sequence)
            text += rest
            if is_stopped and reason is FinishReason.LENGTH:
                reason = FinishReason.STOP_SEQUENCE
        tokens = (self._token(sampled, text),)
        prompt = self._prompt_rows(sequence) if sequence.wants_prompt_logprobs else ()
        finish = _finish(sequence, reason, num_generated, now) if reason else None
        sequence.chain = next_chain(sequence.chain, tokens)
        sequence.num_frames += 1
        frame = Frame(chain=sequence.chain, tokens=tokens, prompt=prompt, finish=finish)
        return Output(sequence, sampled.token, frame, sequence.num_frames - 1)

    def _next_text(self, sequence: Sequence, token: int) -> tuple[str, bool]:
        """The visible text that a token adds, and whether a stop string has come with it."""
        assert sequence.detokenizer and sequence.stop_matcher, "start the sequence first"
        if token in self._special_tokens:
            # chat clients give the end of a turn as a stop string, too: it has no text to be found in
            is_stop = self._name(token) in sequence.request.stopping.stop
            return (_flush(sequence)[0], True) if is_stop else ("", False)
        return sequence.stop_matcher.push(sequence.detokenizer.push(token))

    def _token(self, sampled: Sampled, text: str) -> Token:
        top = tuple(self._top_token(token, logprob) for token, logprob in sampled.top)
        # Text that was held back when a special token ends the sequence has only this token to
        # go with. It is then told as a visible one: readers leave the text of special ones out.
        if sampled.token in self._special_tokens and not text:
            return Token(sampled.token, self._name(sampled.token), sampled.logprob, True, top)
        return Token(sampled.token, text, sampled.logprob, False, top)

    def _prompt_rows(self, sequence: Sequence) -> tuple[TopToken, ...]:
        rows = zip(sequence.prompt_tokens, sequence.prompt_logprobs, strict=True)
        prompt = tuple(self._top_token(token, logprob) for token, logprob in rows)
        assert all(row.logprob is not None for row in prompt[1:]), (
            "the engine left out prompt log-probabilities"
        )
        sequence.prompt_logprobs = []
        return prompt

    def _top_token(self, token: int, logprob: float | None) -> TopToken:
        if token in self._special_tokens:
            return TopToken(token, self._name(token), logprob, True)
        return TopToken(token, self._pieces.text_of(token), logprob)

    def _name(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""


def _flush(sequence: Sequence) -> tuple[str, bool]:
    """All text that is still held back, and whether it has become a stop string."""
    assert sequence.detokenizer and sequence.stop_matcher
    text, is_stopped = sequence.stop_matcher.push(sequence.detokenizer.flush())
    return (text, True) if is_stopped else (text + sequence.stop_matcher.flush(), False)


def _failed(sequence: Sequence, failure: Failure | None) -> Output:
    if failure is None:
        message = (
            f"The model's output for token {len(sequence.output_tokens) + 1} is not a number. "
            "A number format with more range (`--dtype bfloat16` or `float32`) may help"
        )
        failure = Failure(GenerationFailed.kind, message)
    sequence.chain = next_chain(sequence.chain, ())
    sequence.num_frames += 1
    frame = Frame(chain=sequence.chain, failure=failure)
    return Output(sequence, NO_TOKEN, frame, sequence.num_frames - 1)


def _store_prompt_logprobs(sequence: Sequence, rows: PromptLogprobs) -> None:
    """By position, because a preempted prefill tells its rows twice. The first token has none."""
    stored = sequence.prompt_logprobs
    for position, logprob in enumerate(rows.logprobs, rows.start):
        if 0 < position < len(stored):
            stored[position] = logprob


def _finish(sequence: Sequence, reason: FinishReason, num_generated: int, now: float) -> Finish:
    """Times are this worker's own: of a request that was taken over, the last one's."""
    assert sequence.started_at is not None and sequence.first_token_at is not None
    return Finish(
        reason,
        num_generated,
        queue_s=sequence.waited_s + sequence.started_at - sequence.leased_at,
        prefill_s=sequence.first_token_at - sequence.started_at,
        decode_s=now - sequence.first_token_at,
        cached_tokens=sequence.num_cached_tokens,
    )
