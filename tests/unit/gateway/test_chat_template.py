"""The chat template renderer: transformers is the oracle for what it makes; and its limits."""

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gateway.chat_template import TemplateError, compile_template

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nDefault<|im_end|>\\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
    "{% generation %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "  Hé <b>\n"},
    {"role": "assistant", "content": "Ja, "},
    {"role": "user", "content": "{{ 1 }}"},
]
TOOLS = [{"type": "function", "function": {"name": "é<f>", "parameters": {"type": "object"}}}]


def oracle(source: str, messages: list[dict], **options) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
    )
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)


@pytest.mark.parametrize("source", [CHATML, MARKED])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(source, tools, add_generation_prompt):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    template = compile_template(source, bos_token="<s>", eos_token="</s>")
    assert template.render(TALK, **options) == oracle(source, TALK, **options)


@pytest.mark.parametrize("content", ["Ja, ", "  Ja", "Ja"])
@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_continues_the_final_message_as_transformers_does(source, content):
    messages = [TALK[0], {"role": "assistant", "content": content}]
    template = compile_template(source, bos_token="<s>", eos_token="</s>")
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == oracle(source, messages, continue_final_message=True)
    assert text.endswith((content.strip(), content))


def test_variables_of_the_client_do_not_replace_ours():
    template = compile_template(
        "{{ bos_token }}{{ thinks }}{{ messages | length }}", bos_token="<s>"
    )
    assert template.render(TALK, extra={"thinks": "?", "messages": [], "bos_token": "x"}) == "<s>?3"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.nowhere }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 999999999 }}", "too often"),
        ("{{ '%999999999d' % 1 }}", "not allowed"),
        ("{{ 10 ** 999999999 }}", "not allowed"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}", "4000000"),
    ],
)  # fmt: skip
def test_what_a_template_may_not_do_is_an_error_of_the_client(source, reason):
    with pytest.raises(TemplateError, match=reason):
        compile_template(source).render(TALK)


def test_endless_template_ends(monkeypatch):
    monkeypatch.setattr("gateway.chat_template.LONGEST_S", 0.05)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(TemplateError, match="seconds"):
        compile_template(source).render(TALK)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' "])
def test_broken_template(source):
    with pytest.raises(TemplateError, match="broken"):
        compile_template(source)


def test_model_without_a_template_names_the_other_routes():
    with pytest.raises(TemplateError, match="/v1/completions"):
        compile_template("")


def test_message_that_the_template_hides_cannot_be_continued():
    template = compile_template("nothing")
    with pytest.raises(TemplateError, match="continue_final_message"):
        template.render(TALK, continue_final_message=True)
