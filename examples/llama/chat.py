"""Chat: converts messages to a prompt with the checkpoint's template.

Templates are Jinja programs by the authors of the checkpoint. They run in Jinja's immutable
sandbox, with the same settings and helpers as in transformers, so that both render the same text.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from .tokenizer import TokenizerError

__all__ = ["ChatTemplate"]

Message = Mapping[str, Any]

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# The tokens that templates may use; older checkpoints list them in a separate file.
_SPECIAL_FILE = "special_tokens_map.json"
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """The chat template of the model directory `path`.

    Raises:
      TokenizerError: There is no template, or it is not valid.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        path = pathlib.Path(path)
        config = _read_object(path / _CONFIG_FILE)
        self._tokens = {
            name: text
            for name, value in (_read_object(path / _SPECIAL_FILE) | config).items()
            if name in _SPECIAL and (text := _token_text(value)) is not None
        }
        self._origin, source = _source(path, config)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{self._origin} is not a chat template: {error}") from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """Renders the text of a conversation.

        Args:
          messages: Messages, each with a role and a content.
          add_generation_prompt: Whether the text ends where the assistant's answer begins.
          **values: More variables of the template, such as `enable_thinking` or `tools`.

        Raises:
          TokenizerError: The template refuses the conversation, or fails.
        """
        given = {"tools": None, "documents": None, **self._tokens, **values}
        # Templates test whether a key is present, and would print a None.
        present = [
            {name: value for name, value in message.items() if value is not None}
            for message in messages
        ]
        try:
            return self._template.render(
                messages=present,
                add_generation_prompt=add_generation_prompt,
                **given,
            )
        except Exception as error:  # a template can raise anything that Python's operators do
            raise TokenizerError(f"{self._origin}: {error or repr(error)}") from error


class _Generation(jinja2.ext.Extension):
    """Renders `{% generation %}` blocks, which mark text for training, as plain text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parses the block as a call block, so that its statements have their own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return str(caller())


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encodes JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _source(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[pathlib.Path, str]:
    """Finds the template; returns its file and its text."""
    file = path / _TEMPLATE_FILE
    if file.is_file():
        try:
            return file, file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file} is not UTF-8: {error}") from error
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
        given = named.get("default")
    if isinstance(given, str):
        return path / _CONFIG_FILE, given
    raise TokenizerError(
        f"{path} has no chat template, neither {_TEMPLATE_FILE} nor a chat_template in "
        f"{_CONFIG_FILE}: it is not a chat model"
    )


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{file} holds a JSON {type(values).__name__}, expected an object")
    return values


def _token_text(value: object) -> str | None:
    """The text of a special token, given as text or as an object with a content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
