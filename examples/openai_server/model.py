"""The served model, as far as the server sees it: its name, its tokenizer and its chat template."""

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

__all__ = ["ServedModel"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model under a name.

    Attributes:
      name: As requests have it.
      tokenizer: Of the checkpoint.
      vocab_size: Token ids lie below.
      max_seq_len: Most tokens of a sequence, prompt and answer.
      template: Of the checkpoint; None if it is not a chat model.
      created: When, in Unix time.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    template: ChatTemplate | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @staticmethod
    def find_template(checkpoint: pathlib.Path) -> ChatTemplate | None:
        """The chat template of a model directory.

        Returns:
          None for a model that has none, or several of which none is the default.

        Raises:
          TokenizerError: There is one, but it is not valid.
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
        """The token ids of a request's prompts. Any thread may call this.

        Raises:
          ApiError: Another model, no chat model, or prompts that it cannot take.
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
        """Texts of the prompts for answers that begin with them; empty for other requests."""
        return [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
            for prompt in (call.prompts if call.echo else ())
        ]

    def max_tokens(self, call: Call, ids: Sequence[int]) -> int:
        """Tokens to produce at most; by default 16, in a chat all that there is room for."""
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
            # The template's variables are arguments of `render`, which has some names itself.
            reason = "chat_template_kwargs: wanted other names than those of the messages"
            raise ApiError(reason, param="messages", code="invalid_value") from error
        except TokenizerError as error:
            cause = error.__cause__
            # A template refuses messages by `raise_exception`, in words for the user. The texts of
            # other errors show the file and the code of the template.
            if type(cause) is jinja2.TemplateError:
                reason = f"the chat template refuses the messages: {cause}"
            else:
                reason = "the chat template cannot render the messages"
                _log.warning("%s", error)
            raise ApiError(reason[:1000], param="messages", code="invalid_value") from error

    def _encode(self, text: str, param: str, special: bool = True) -> list[int]:
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
