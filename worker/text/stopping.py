"""Why a generation ends: stop strings in streamed text, and the decision after each token.

Plain search, no regular expressions; knows neither tokens' texts nor Redis.
"""

from common.messages import FinishReason, Stopping


class StopMatcher:
    """Looks for stop strings in a text that comes in parts, however it is split.

    The match that ends first counts; of those that end together, the longest. What follows it is
    dropped. Without `include_stop` the stop string is cut, so text that may turn out to be one is
    held back:

        stop "END"      push("the E") -> "the "      push("N") -> ""      push("joy") -> "ENjoy"
    """

    def __init__(self, stop: tuple[str, ...], *, include_stop: bool) -> None:
        self._stop = tuple(text for text in stop if text)
        self._is_included = include_stop
        self._tail = ""  # the longest end of the text that is a proper beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has come (the end)."""
        if not self._stop or not text:
            return text, False
        known = len(self._tail)
        text = self._tail + text
        # With the stop string included nothing is cut, so the tail has been shown already.
        shown = known if self._is_included else 0
        match = self._find(text)
        if match:
            self._tail = ""
            start, end = match
            return text[shown : end if self._is_included else start], True
        self._tail = self._open_end(text)
        held = 0 if self._is_included else len(self._tail)
        return text[shown : len(text) - held], False

    def flush(self) -> str:
        """The text still held back, at the end."""
        tail, self._tail = self._tail, ""
        return "" if self._is_included else tail

    def _find(self, text: str) -> tuple[int, int] | None:
        """Start and end of the match that ends first."""
        found = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _open_end(self, text: str) -> str:
        last, longest = text[-1], 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop[size - 1] == last and text.endswith(stop[:size]):
                    longest = size
                    break
        return text[len(text) - longest :]


def finish_reason(
    stopping: Stopping,
    *,
    token: int,
    num_generated: int,
    is_stopped: bool,
    eos_tokens: frozenset[int],
) -> FinishReason | None:
    """Whether a generation ends with `token`, its `num_generated`-th; None to go on.

    In this order: an end-of-sequence token, a stop string, the length. TGI asks for the length
    first and therefore reports `length` when the very last token is the end-of-sequence token.
    """
    can_end = not stopping.ignore_eos and num_generated > stopping.min_new_tokens
    if can_end and token in eos_tokens:
        return FinishReason.EOS_TOKEN
    if is_stopped:
        return FinishReason.STOP_SEQUENCE
    if num_generated >= stopping.max_new_tokens:
        return FinishReason.LENGTH
    return None
