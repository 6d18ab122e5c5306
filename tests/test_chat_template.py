"""Chat templates: what they render, where they are found, and what they may not do."""

from __future__ import annotations

import json
import pathlib

import pytest
from llama.chat import ChatTemplate
from llama.tokenizer import TokenizerError

_MESSAGES = [{"role": "user", "content": "<b> & 'c'"}]


def _template(folder: pathlib.Path, source: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(source)
    return ChatTemplate(folder)


def test_where_templates_are_found(tmp_path) -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        ChatTemplate(tmp_path)
    config = {"chat_template": "A{{ bos_token }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate(tmp_path).render(_MESSAGES) == "A<s>"
    config["chat_template"] = [{"name": "default", "template": "B"}, {"name": "x", "template": "C"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate(tmp_path).render(_MESSAGES) == "B"
    assert _template(tmp_path, "D{{ bos_token }}").render(_MESSAGES) == "D<s>"


def test_text_is_not_escaped(tmp_path) -> None:
    template = _template(tmp_path, "{{ messages[0].content }}{{ messages[0] | tojson }}")
    assert template.render(_MESSAGES) == "<b> & 'c'" + json.dumps(_MESSAGES[0])


def test_variables_reach_the_template(tmp_path) -> None:
    template = _template(tmp_path, "{{ add_generation_prompt }} {{ deep }} {{ tools is none }}")
    assert template.render(_MESSAGES, add_generation_prompt=False, deep=3) == "False 3 True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_templates_that_fail(tmp_path, source: str) -> None:
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        _template(tmp_path, source).render(_MESSAGES)


def test_a_template_that_is_not_valid(tmp_path) -> None:
    with pytest.raises(TokenizerError, match="is not a chat template"):
        _template(tmp_path, "{% for")
