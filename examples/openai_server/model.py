"""The server's view of the model: its name, tokenizer and chat template."""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Sequence

import jinja2
from llama.chat import ChatTemplate
from llama.tokenizer import Tokenizer, TokenizerError

from .calls import Call
from .errors import ApiError
from .fields import check_text

__all__ = ["ServedModel"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A served model.

    Attributes:
      name: Its name in requests.
      tokenizer: The checkpoint's tokenizer.
      vocab_size: Upper bound of token ids.
      max_seq_len: The most tokens of a sequence, including the prompt.
      template: The checkpoint's chat template; None if it is not a chat model.
      created: Time of creation, in Unix time.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    template: ChatTemplate | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @staticmethod
    def find_template(checkpoint: pathlib.Path) -> ChatTemplate | None:
        """Finds the chat template of a model directory.

        Returns:
          None for a model that has none, or that has several without a default.

        Raises:
          TokenizerError: The template is not valid.
        """
        if (checkpoint / "chat_template.jinja").is_file():
            return ChatTemplate(checkpoint)
        file = checkpoint / "tokenizer_config.json"
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{file} is not JSON: {error}") from error
        given = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(given, list):
            names = [each.get("name") for each in given if isinstance(each, dict)]
            return ChatTemplate(checkpoint) if "default" in names else None
        if given is None:
            return None
        if not isinstance(given, str):
            raise TokenizerError(
                f"{file}: chat_template is a JSON {type(given).__name__}, expected a string or a "
                "list of named templates"
            )
        return ChatTemplate(checkpoint)

    def encode(self, call: Call) -> list[list[int]]:
        """Encodes a request's prompts. Any thread may call this.

        Raises:
          ApiError: The request is for another model, is a chat although this is not a chat model,
            or has invalid prompts.
        """
        if call.model != self.name:
            raise ApiError(
                f"there is no model {call.model[:200]!r} here, only {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if call.is_chat:
            # The template writes the special tokens itself.
            prompts = [self._encode(self._render(call), "messages", special=False)]
        else:
            prompts = [
                self._encode(prompt, "prompt") if isinstance(prompt, str) else prompt
                for prompt in call.prompts
            ]
        for ids in prompts:
            self._check(ids, call)
        return prompts

    def echoes(self, call: Call) -> list[str]:
        """Texts of the prompts if the request has `echo`, else empty."""
        return [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
            for prompt in (call.prompts if call.echo else ())
        ]

    def max_tokens(self, call: Call, ids: Sequence[int]) -> int:
        """The most tokens to generate; by default 16, in a chat as many as fit."""
        room = self.max_seq_len - len(ids)
        default = room if call.is_chat else min(16, room)
        return default if call.max_tokens is None else call.max_tokens

    def _render(self, call: Call) -> str:
        if self.template is None:
            raise ApiError(
                f"{self.name} has no chat template: use /v1/completions",
                param="messages",
                code="unsupported_parameter",
            )
        try:
            return self.template.render(call.messages, **call.template_values)
        except TypeError as error:
            # The template's variables are keyword arguments of `render` and may clash with others.
            reason = "chat_template_kwargs: wanted other names than those of the messages"
            raise ApiError(reason, param="messages", code="invalid_value") from error
        except TokenizerError as error:
            cause = error.__cause__
            # Templates refuse messages by `raise_exception`, with a text for the user. The texts of
            # other errors would reveal the file and code of the template.
            if type(cause) is jinja2.TemplateError:
                reason = f"the chat template refuses the messages: {cause}"
            else:
                reason = "the chat template cannot render the messages"
                _log.warning("%s", error)
            raise ApiError(reason[:1000], param="messages", code="invalid_value") from error

    def _encode(self, text: str, param: str, special: bool = True) -> list[int]:
        check_text(text, param)  # a template may add text that is none
        try:
            return self.tokenizer.encode(text, special)
        except TokenizerError as error:
            reason = "the text has no tokens, or some that the model does not have"
            raise ApiError(reason, param=param, code="invalid_value") from error

    def _check(self, ids: Sequence[int], call: Call) -> None:
        param = "messages" if call.is_chat else "prompt"
        if not ids:
            raise ApiError("the prompt has no tokens", param=param, code="invalid_value")
        if max(ids) >= self.vocab_size:
            raise ApiError(
                f"token id {max(ids)} is not below the vocabulary's size, {self.vocab_size}",
                param=param,
                code="invalid_value",
            )
        asked = call.max_tokens or 1
        if len(ids) + asked > self.max_seq_len:
            raise ApiError(
                f"the prompt has {len(ids)} tokens, and {asked} are to follow, but a sequence has "
                f"at most {self.max_seq_len}",
                param=param if call.max_tokens is None else "max_tokens",
                code="context_length_exceeded",
            )
