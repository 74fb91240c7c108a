"""What the sampler keeps of the sequence in a slot."""

from dataclasses import dataclass

from common.messages import Sampling
from worker.engine.plan import SequenceStart
from worker.sampling.grammar import GrammarMatcher
from worker.sampling.history import TokenHistory


@dataclass(slots=True)
class SlotState:
    """The rules of a sequence, and the memory that they need."""

    sampling: Sampling
    num_prompt_tokens: int
    min_new_tokens: int
    last_token: int
    history: TokenHistory | None  # None: no penalty asks for it
    grammar: GrammarMatcher | None

    @classmethod
    def of(cls, start: SequenceStart, grammar: GrammarMatcher | None) -> "SlotState":
        """What the sequence generated before counts for its penalties."""
        rules = start.sampling
        has_penalty = (
            rules.repetition_penalty != 1 or rules.frequency_penalty or rules.presence_penalty
        )
        history = TokenHistory(start.prompt_tokens, start.output_tokens) if has_penalty else None
        return cls(
            rules,
            len(start.prompt_tokens),
            start.min_new_tokens,
            (start.output_tokens or start.prompt_tokens)[-1],
            history,
            grammar,
        )

    @property
    def has_rules(self) -> bool:
        """Whether a rule of `adjust.py` may change a logit."""
        rules = self.sampling
        return bool(
            rules.logit_bias
            or rules.watermark
            or self.history is not None
            or self.grammar is not None
            or self.min_new_tokens
        )

    def record(self, token: int) -> None:
        """The sequence generated this token."""
        self.last_token = token
        if self.history is not None:
            self.history.record(token)
        if self.grammar is not None:
            self.grammar.record(token)
