"""Conversations with a chat model: their token ids, and decode_llama.py --chat."""

from __future__ import annotations

import io
import json
import pathlib
import sys
from typing import Any

import decode_llama
import pytest
from llama.chat import ChatTemplate
from llama.conversation import Conversation
from llama.tokenizer import Tokenizer
from llama_models import UNTIED, write_byte_tokenizer, write_checkpoint

_PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{{ '[assistant]' }}"
# The answer follows the prompt directly, as in real templates.
_CONTINUED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _write(path: pathlib.Path, template: str | None, **config: Any) -> ChatTemplate:
    """Writes a byte tokenizer, and a template in tokenizer_config.json, to a directory."""
    write_byte_tokenizer(path)
    values = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    if template is not None:
        values["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return ChatTemplate(path)


def test_a_conversation_goes_on_with_its_ids(tmp_path: pathlib.Path) -> None:
    template = _write(tmp_path, _PLAIN)
    tokenizer = Tokenizer(tmp_path, 256)
    stop = tokenizer.encode("\n", special=False)
    talk = Conversation(template, tokenizer, stop)
    prompt = talk.ask("one")
    assert tokenizer.decode(prompt) == "[user]one[end][assistant]"
    answer = tokenizer.encode("two \N{SNOWMAN}", special=False)
    following = talk.follow(prompt, answer + stop, "three")
    assert following[: len(prompt + answer)] == prompt + answer
    assert tokenizer.decode(following) == (
        "[user]one[end][assistant][assistant]two \N{SNOWMAN}[end][user]three[end][assistant]"
    ).replace("[assistant][assistant]", "[assistant]")
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user"]


def test_a_template_that_changes_answers_is_encoded_anew(tmp_path: pathlib.Path) -> None:
    trimmed = _PLAIN.replace("m.content", "m.content | trim")
    template = _write(tmp_path, trimmed)
    tokenizer = Tokenizer(tmp_path, 256)
    talk = Conversation(template, tokenizer)
    prompt = talk.ask("one")
    following = talk.follow(prompt, tokenizer.encode(" two ", special=False), "three")
    assert talk.messages[1]["content"] == " two "
    assert tokenizer.decode(following) == template.render(talk.messages)
    assert "]two[end]" in tokenizer.decode(following)


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert decode_llama.main(["--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_turns_of_the_example_are_one_conversation(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    write_checkpoint(tmp_path, UNTIED)
    template = _write(tmp_path, _CONTINUED)
    arguments = ["--checkpoint", tmp_path, "--chat", "--prompt", "one", "--prompt", "other"]
    arguments += ["--turn", "two", "--turn", "three", "--max-new-tokens", 12]
    sequences = _json(capsys, *arguments)["sequences"]
    tokenizer = Tokenizer(tmp_path, 256)
    assert len(sequences) == 6
    for conversation, first in ((sequences[::2], "one"), (sequences[1::2], "other")):
        texts = [first, "two", "three"]
        talk = Conversation(template, tokenizer)
        prompt = talk.ask(texts[0])
        for turn, sequence in enumerate(conversation):
            assert sequence["prompt_ids"] == prompt
            assert sequence["cached_tokens"] > 0 or turn == 0
            if turn < 2:
                prompt = talk.follow(prompt, sequence["output_ids"], texts[turn + 1])
                known = sequence["prompt_ids"] + sequence["output_ids"]
                if prompt[: len(known)] == known:
                    assert conversation[turn + 1]["cached_tokens"] == len(known) - 1
    assert decode_llama.main([*map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "> one" in shown
    assert "> three" in shown


def test_mistakes_with_chat(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    write_checkpoint(tmp_path, UNTIED)
    common = ["--checkpoint", str(tmp_path), "--chat", "--prompt", "one", "--max-new-tokens", "4"]
    assert decode_llama.main(common) == 2
    assert "has no chat template" in capsys.readouterr().err
    _write(tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert decode_llama.main(common) == 2
    assert "tokenizer_config.json: roles must alternate" in capsys.readouterr().err
    _write(tmp_path, _PLAIN)
    long = ["--max-seq-len", "40", "--turn", "and now something that is longer"]
    assert decode_llama.main([*common, *long]) == 2
    assert "with 1 more turns the conversation" in capsys.readouterr().err


def _chat_model(tmp_path: pathlib.Path) -> list[str]:
    """Writes a checkpoint with a chat template; returns the arguments that select it."""
    write_checkpoint(tmp_path, UNTIED)
    _write(tmp_path, _CONTINUED)
    return ["--checkpoint", str(tmp_path), "--chat", "--max-new-tokens", "6"]


def test_messages_from_a_pipe(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = _chat_model(tmp_path)
    scripted = _json(capsys, *common, "--prompt", "one", "--turn", "two")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\r\n\n  \ntwo"))
    piped = _json(capsys, *common)
    assert piped["sequences"] == scripted["sequences"]
    assert piped["turns"] == scripted["turns"]
    first, second = piped["sequences"]
    assert second["cached_tokens"] == len(first["prompt_ids"] + first["output_ids"]) - 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert decode_llama.main(common) == 0
    shown = capsys.readouterr().out
    for message, sequence in zip(("one", "two"), piped["sequences"], strict=True):
        assert f"> {message}\n{sequence['text']} [length]\n" in shown
    assert "turn 2: tokens read / cached" in shown


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"\n \n", [], "reads messages from standard input, which has none"),
        (b"one\n\xff\n", [], "standard input is not UTF-8"),
        (b"one\n" + b"x" * 250 + b"\n", [], "tokens, but a sequence may have 256 in all"),
        (b"x" * 40, ["--max-seq-len", "32"], "prompt 0 has 58 tokens"),
    ],
    ids=["blank", "bytes", "long", "first"],
)
def test_messages_that_cannot_be(
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    options: list[str],
    words: str,
) -> None:
    common = _chat_model(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert decode_llama.main([*common, *options]) == 2
    assert words in capsys.readouterr().err


def test_no_standard_input(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = _chat_model(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    assert decode_llama.main(common) == 2
    assert "which has none" in capsys.readouterr().err
