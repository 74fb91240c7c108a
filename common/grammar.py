"""Grammars as llguidance reads them. The gateway checks a request with this, and a worker follows
it, so the two cannot disagree on what is valid. Knows neither tokens nor HTTP."""

import llguidance

from common.messages import Grammar, GrammarKind

# Between the parts of a JSON text: what makes it readable, but not the endless white space in which
# small models get lost. A schema may say otherwise by its own "x-guidance".
_JSON_DEFAULTS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


class GrammarError(ValueError):
    """The grammar cannot be followed; the message is for the client that sent it."""


def check_grammar(grammar: Grammar) -> None:
    """Compile a grammar and throw the result away; takes about a millisecond. Raises GrammarError."""
    problem = llguidance.LLMatcher.validate_grammar(llguidance_text(grammar))
    if problem and not problem.startswith("WARNING"):
        raise GrammarError(short_reason(problem))


def llguidance_text(grammar: Grammar) -> str:
    """The grammar in llguidance's own language, as its matcher takes it.

    Raises GrammarError for what is no JSON schema.
    """
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
