"""TGI's headers of an answer: what computed it, and how long each part took. Whole milliseconds, but x-compute-time."""

from collections.abc import Sequence

from common.messages import Finish, ModelCard
from gateway.record import RequestRecord
from gateway.settings import GatewaySettings


def compute_headers(
    settings: GatewaySettings, card: ModelCard, *, num_characters: int
) -> dict[str, str]:
    """Those that are known before the first token, so that streams have them too."""
    kind = settings.compute_type or f"{card.device or 'gpu'}+optimized"
    return {"x-compute-type": kind, "x-compute-characters": str(num_characters)}


def time_headers(
    record: RequestRecord,
    finishes: Sequence[Finish],
    *,
    num_prompt_tokens: int,
    validation_s: float,
    has_compute_time: bool = True,
) -> dict[str, str]:
    """Those of an answer in one piece: sums over its sequences, of what each has of its own.

    Args:
        has_compute_time: whether x-compute-time is among them, which TGI leaves out of completions. In seconds.
    """
    inference_s = sum(finish.prefill_s + finish.decode_s for finish in finishes)
    num_generated = sum(finish.generated_tokens for finish in finishes)
    times = {
        "x-total-time": record.elapsed_s,
        "x-validation-time": validation_s,
        "x-queue-time": sum(finish.queue_s for finish in finishes),
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, num_generated),
    }
    return {
        **({"x-compute-time": f"{record.elapsed_s:.6f}"} if has_compute_time else {}),
        **{name: str(round(value * 1000)) for name, value in times.items()},
        "x-prompt-tokens": str(num_prompt_tokens),
        "x-generated-tokens": str(num_generated),
    }
