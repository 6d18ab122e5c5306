"""Chat templates: what they render, where they are found, and what they are not allowed to do. The
text must equal that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jinja2
import pytest
from chat_templates import TEMPLATES
from llama.chat import ChatTemplate
from llama.tokenizer import TokenizerError
from llama_models import write_byte_tokenizer
from tokenizers import Tokenizer as Fast

_MESSAGES = [{"role": "user", "content": "<b> & 'c'"}]

_TALK = [
    {"role": "user", "content": "  Who <are> you & why?\n"},
    {
        "role": "assistant",
        "content": "<think>\nHm.\n</think>\n\n I'm a model.  ",
        "reasoning_content": None,
    },
    {"role": "user", "content": "naïve \N{SNOWMAN} 'quotes' \"too\""},
]
_SYSTEM = {"role": "system", "content": " Be brief. "}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "<b>The</b> weather \N{SNOWMAN}",
            "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {}}},
        },
    }
]
_CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"z": "<Ulm>"}}}
    ],
}


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


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("jinja_file", [False, True], ids=["config", "file"])
def test_text_is_that_of_transformers(tmp_path: pathlib.Path, name: str, jinja_file: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    write_byte_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Fast.from_file(str(tmp_path / "tokenizer.json")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATES[name],
    )
    theirs.save_pretrained(tmp_path, save_jinja_files=jinja_file)
    assert (tmp_path / "chat_template.jinja").is_file() == jinja_file
    ours = ChatTemplate(tmp_path)
    talks = [_TALK[:1], _TALK[:2], _TALK, [_SYSTEM, *_TALK]]
    options: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"date_string": "1 Jan"}]
    if name in ("llama3", "qwen2.5"):
        talks.append([_TALK[0], _CALL])
        options.append({"tools": _TOOLS})
    texts = set()
    for talk in talks:
        for values in options:
            for prompt in (False, True):
                expected = theirs.apply_chat_template(
                    talk, tokenize=False, add_generation_prompt=prompt, **values
                )
                assert ours.render(talk, add_generation_prompt=prompt, **values) == expected
                texts.add(expected)
    assert len(texts) >= len(talks)
    wrong = {"mistral": [_TALK[0], _TALK[0]], "llama3": [_TALK[0], {**_CALL, "tool_calls": []}]}
    if name in wrong:
        with pytest.raises(jinja2.TemplateError) as caught:
            theirs.apply_chat_template(wrong[name], tokenize=False)
        with pytest.raises(TokenizerError, match=str(caught.value)):
            ours.render(wrong[name])
