"""A client's grammar in TGI's shapes as the workers take it, compiled once to see that it can be.

Knows no HTTP.
"""

import asyncio

from common.errors import ValidationError
from common.grammar import GrammarError, check_grammar
from common.messages import Grammar, GrammarKind
from gateway.json_schema import schema_grammar
from gateway.schemas.native import AnyGrammar, JsonGrammar, JsonSchemaGrammar, RegexGrammar


async def checked_grammar(given: AnyGrammar | None) -> Grammar | None:
    """Raises ValidationError, with the reason, for a grammar that no worker could follow."""
    if given is None:
        return None
    grammar = _grammar(given)
    await require_valid(grammar)
    return grammar


async def require_valid(grammar: Grammar) -> None:
    """Raises ValidationError, with the reason, for a grammar that no worker could follow."""
    try:
        # A large schema takes a while, in which the compiler does without Python's lock.
        await asyncio.to_thread(check_grammar, grammar)
    except GrammarError as error:
        raise ValidationError(f"Input validation error: grammar is not valid: {error}") from error


def _grammar(given: AnyGrammar) -> Grammar:
    if isinstance(given, JsonSchemaGrammar):
        return schema_grammar(given.value.value)
    if isinstance(given, JsonGrammar):
        return schema_grammar(given.value)
    is_regex = isinstance(given, RegexGrammar)
    return Grammar(GrammarKind.REGEX if is_regex else GrammarKind.LARK, given.value)
