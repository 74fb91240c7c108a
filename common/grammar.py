"""Grammars as llguidance reads them. The gateway checks a request with this, and a worker follows
it, so the two cannot disagree on what is valid. Knows neither tokens nor HTTP."""

from functools import partial

import llguidance

from common.deep_stack import on_deep_stack
from common.messages import Grammar, GrammarKind

# Between the parts of a JSON text: what makes it readable, but not the endless white space in which
# small models get lost. A schema may say otherwise by its own "x-guidance".
_JSON_DEFAULTS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}

# Large schemas (128 tools, 500 optional fields) need 2,000 items a step and a size of 6,000; with more
# than these, a step takes over 15 ms, or compiling half a second.
LIMITS = llguidance.LLParserLimits(
    step_max_items=10_000, max_grammar_size=20_000, verbose_errors=False
)
# What is compiled is nested as deep as clients like: the worst of this length take 100 MiB of stack.
MOST_CHARACTERS = 250_000


class GrammarError(ValueError):
    """The grammar cannot be followed; the message is for the client that sent it."""


def check_grammar(grammar: Grammar) -> None:
    """Compile a grammar and throw the result away; takes about a millisecond. Raises GrammarError."""
    text = llguidance_text(grammar)
    validate = partial(llguidance.LLMatcher.validate_grammar, text, limits=LIMITS)
    problem = on_deep_stack(validate)
    if problem and not problem.startswith("WARNING"):
        raise GrammarError(short_reason(problem))


def compiled(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """What follows a text token by token. Raises GrammarError."""
    text = llguidance_text(grammar)
    matcher = on_deep_stack(
        partial(llguidance.LLMatcher, tokenizer, text, log_level=0, limits=LIMITS)
    )
    if matcher.is_error():
        raise GrammarError(short_reason(matcher.get_error()))
    return matcher


def llguidance_text(grammar: Grammar) -> str:
    """The grammar in llguidance's own language, as its matcher takes it.

    Raises GrammarError for what is no JSON schema, or too long.
    """
    if len(grammar.value) > MOST_CHARACTERS:
        raise GrammarError(
            f"it must have up to {MOST_CHARACTERS} characters. Given: {len(grammar.value)}"
        )
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            try:
                return matcher.grammar_from_json_schema(grammar.value, defaults=_JSON_DEFAULTS)
            except ValueError as error:
                raise GrammarError(short_reason(str(error))) from error
        case GrammarKind.REGEX:
            return matcher.grammar_from_regex(grammar.value)
        case GrammarKind.LARK:
            return matcher.grammar_from_lark(grammar.value)


def short_reason(problem: str) -> str:
    """llguidance's explanation on one line; the excerpts that it draws below are left out."""
    lines = [line.strip() for line in problem.splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error:")), "")
    return reason or next((line for line in lines if line), "it cannot be compiled")
