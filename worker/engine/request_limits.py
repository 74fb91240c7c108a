"""What an engine can take at all. Gateways check the same by the model's card. No torch."""

from dataclasses import dataclass

from common.errors import ValidationError
from common.messages import GenerationRequest


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the tables of one engine were built for; None is no limit.

    A request may have been admitted by the card of another worker of the model, or of this one
    before it was started with other settings. It must not end the worker.
    """

    max_total_tokens: int | None = None  # of prompt and answer
    vocab_size: int | None = None

    def check(self, request: GenerationRequest) -> None:
        """Raises ValidationError."""
        num_prompt, num_new = len(request.prompt_tokens), request.stopping.max_new_tokens
        largest = self.max_total_tokens
        if largest is not None and num_prompt + num_new > largest:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {largest} on this worker. "
                f"Given: {num_prompt} `inputs` tokens and {num_new} `max_new_tokens`"
            )
        token, size = max(request.prompt_tokens, default=0), self.vocab_size
        if size is not None and token >= size:
            raise ValidationError(
                f"`inputs` must have token ids below {size}, the vocabulary of this worker's model. "
                f"Given: {token}"
            )
