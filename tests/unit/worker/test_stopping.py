"""Stop strings and the reason for the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import FinishReason, Stopping
from worker.text.stopping import StopMatcher, finish_reason


def run(parts, stop, *, include_stop):
    """Everything shown for a text in parts, and whether it was stopped."""
    matcher = StopMatcher(tuple(stop), include_stop=include_stop)
    shown = ""
    for part in parts:
        text, is_stopped = matcher.push(part)
        shown += text
        if is_stopped:
            return shown, True
    return shown + matcher.flush(), False


def reference(text, stop, *, include_stop):
    """Letter by letter: the first place where the text so far ends in a stop string."""
    for end in range(1, len(text) + 1):
        matches = [one for one in stop if text[:end].endswith(one)]
        if matches:
            return text[: end if include_stop else end - max(map(len, matches))], True
    return text, False


@pytest.mark.parametrize(
    ("include_stop", "expected"), [(True, "int main() {}\n/test;"), (False, "int main() {}\n")]
)
def test_a_stop_in_the_middle_of_a_token_is_found(include_stop, expected):
    assert run(["int main() {}\n", "/te", "st; "], ["/test;"], include_stop=include_stop) == (
        expected,
        True,
    )


def test_text_that_may_become_a_stop_is_held_back():
    matcher = StopMatcher(("END",), include_stop=False)
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("joy") == ("ENjoy", False)
    assert matcher.push("EE") == ("E", False)
    assert matcher.flush() == "E"
    assert matcher.flush() == ""


def test_nothing_is_held_back_when_the_stop_stays_in_the_text():
    matcher = StopMatcher(("END",), include_stop=True)
    assert matcher.push("the EN") == ("the EN", False)
    assert matcher.push("D of it") == ("D", True)


def test_the_match_that_ends_first_wins():
    assert run(["xabcd"], ["abcd", "bc"], include_stop=False) == ("xa", True)
    assert run(["xabc"], ["abc", "c", "bc"], include_stop=False) == ("x", True)


def test_a_stop_is_text_not_a_pattern():
    assert run(["test\n"], ["test"], include_stop=True) == ("test", True)
    assert run(["aXb"], ["a.b", "("], include_stop=True) == ("aXb", False)


def test_an_empty_stop_never_matches():
    assert run(["abc"], [""], include_stop=False) == ("abc", False)


@given(
    st.lists(st.text("ab ", max_size=4), max_size=8),
    st.lists(st.text("ab ", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_the_split_into_parts_changes_nothing(parts, stop, include_stop):
    expected = reference("".join(parts), stop, include_stop=include_stop)
    assert run(parts, stop, include_stop=include_stop) == expected


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1),
)
def test_only_a_possible_stop_is_held_back(parts, stop):
    matcher = StopMatcher(tuple(stop), include_stop=False)
    seen = shown = ""
    for part in parts:
        seen += part
        text, is_stopped = matcher.push(part)
        shown += text
        if is_stopped:
            return
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        assert not held or any(one.startswith(held) for one in stop)


EOS = 2


@pytest.mark.parametrize(
    ("stopping", "token", "num_generated", "is_stopped", "expected"),
    [
        (Stopping(10), 5, 3, False, None),
        (Stopping(10), EOS, 3, False, FinishReason.EOS_TOKEN),
        (Stopping(10), EOS, 10, False, FinishReason.EOS_TOKEN),
        (Stopping(10), 5, 10, True, FinishReason.STOP_SEQUENCE),
        (Stopping(10), 5, 10, False, FinishReason.LENGTH),
        (Stopping(10, ignore_eos=True), EOS, 3, False, None),
        (Stopping(10, ignore_eos=True), EOS, 10, False, FinishReason.LENGTH),
        (Stopping(10, min_new_tokens=3), EOS, 3, False, None),
        (Stopping(10, min_new_tokens=3), EOS, 4, False, FinishReason.EOS_TOKEN),
        (Stopping(10, min_new_tokens=3), 5, 2, True, FinishReason.STOP_SEQUENCE),
    ],
)
def test_finish_reason(stopping, token, num_generated, is_stopped, expected):
    reason = finish_reason(
        stopping,
        token=token,
        num_generated=num_generated,
        is_stopped=is_stopped,
        eos_tokens=frozenset({EOS}),
    )
    assert reason == expected
