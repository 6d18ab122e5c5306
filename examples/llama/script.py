"""The requests of a run: prompts and turns of the command line, or messages from standard input."""

import argparse
from collections.abc import Iterator
from typing import Protocol

from .arguments import talks
from .chat import ChatTemplate
from .config import LlamaConfig
from .console import Console
from .conversation import Conversation
from .prompts import InputError, read_prompts, read_turns
from .scan_runner import Request
from .tokenizer import Tokenizer, TokenizerError
from .turns import next_turn

__all__ = ["Script", "make_script"]

# Requests to run together, and the text to print before each.
Turn = tuple[list[Request], list[str]]


class Script(Protocol):
    """The requests of a run, turn by turn.

    Attributes:
      first: The requests of the first turn; empty if they are not known yet.
      later: The most tokens that later turns may add to a sequence.
    """

    first: list[Request]
    later: int

    def turns(self) -> Iterator[Turn]:
        """Yields all turns. The requests of a turn must be finished before the next is taken.

        Raises:
          InputError: A conversation has become too long, or a message is not valid.
        """

    def interrupted(self) -> bool:
        """Whether the running requests should be cancelled."""


def make_script(
    args: argparse.Namespace, config: LlamaConfig, tokenizer: Tokenizer, max_seq_len: int
) -> Script:
    """Makes the script for the arguments.

    Raises:
      InputError: --chat with a checkpoint without a chat template, or prompts that are not valid or
        do not fit.
    """
    template = None
    if args.chat:
        try:
            template = ChatTemplate(args.checkpoint)
        except TokenizerError as error:
            raise InputError(f"--chat: {error}") from error
        if talks(args):
            talk = Conversation(template, tokenizer, config.eos_token_ids)
            return _Talk(talk, Console(args.json), args.max_new_tokens, max_seq_len)
    return _Prepared(args, config, tokenizer, template, max_seq_len)


def make_requests(
    prompts: list[list[int]], max_new_tokens: int, max_seq_len: int, num_samples: int = 1
) -> list[Request]:
    """Makes a request for each sample of each prompt; raises InputError for a prompt that leaves no
    room for a token."""
    requests = []
    for index, ids in enumerate(prompts):
        if len(ids) >= max_seq_len:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens, but a sequence may have {max_seq_len} "
                "in all; shorten it or raise --max-seq-len"
            )
        group = index if num_samples > 1 else None
        requests += [
            Request(index * num_samples + sample, ids, max_new_tokens, group=group)
            for sample in range(num_samples)
        ]
    return requests


def tokens_of_turns(turns: list[list[int]], requests: list[Request], max_seq_len: int) -> int:
    """The most tokens that later turns may add to a sequence; raises InputError if they may not
    fit."""
    if not turns:
        return 0
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    more = sum(len(ids) + longest.max_new_tokens for ids in turns)
    if len(longest.prompt_ids) + more >= max_seq_len:
        raise InputError(
            f"with {len(turns)} more turns the conversation of prompt {longest.index} may ask for "
            f"{len(longest.prompt_ids) + more} tokens, but a sequence may have {max_seq_len} in "
            "all; lower --max-new-tokens or raise --max-seq-len"
        )
    return more


class _Prepared:
    """Prompts and turns from the command line; see `Script`."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        max_seq_len: int,
    ) -> None:
        prompts = read_prompts(args)
        self._texts = read_turns(args)
        self._max_seq_len = max_seq_len
        self._chats: list[Conversation] = []
        if template is None:
            ids = [tokenizer.encode(prompt) for prompt in prompts]
            self._turns = [tokenizer.encode(text, special=False) for text in self._texts]
        else:
            stop_ids = config.eos_token_ids
            self._chats = [Conversation(template, tokenizer, stop_ids) for _ in prompts]
            ids = [chat.ask(prompt) for chat, prompt in zip(self._chats, prompts, strict=True)]
            self._turns = self._chats[0].later_turns(self._texts)
        self.first = make_requests(ids, args.max_new_tokens, max_seq_len, args.num_samples)
        self.later = tokens_of_turns(self._turns, self.first, max_seq_len)
        # In a chat, an answer begins on a new line; a continuation of a prompt does not.
        self._end = "\n" if self._chats else ""
        self._leads = [
            f"> {prompt}{self._end}" for prompt in prompts for _ in range(args.num_samples)
        ]

    def turns(self) -> Iterator[Turn]:
        requests = self.first
        yield requests, self._leads
        for text, ids in zip(self._texts, self._turns, strict=True):
            if self._chats:
                requests = [
                    chat.next_request(request, text, self._max_seq_len)
                    for chat, request in zip(self._chats, requests, strict=True)
                ]
            else:
                requests = next_turn(requests, ids)
            yield requests, [f"> {text}{self._end}"] * len(requests)

    def interrupted(self) -> bool:
        return False


class _Talk:
    """An interactive conversation; see `Script`.

    Args:
      conversation: An empty conversation.
      console: The source of the messages.
      max_new_tokens: The most tokens of each answer.
      max_seq_len: The most tokens of a sequence.
    """

    def __init__(
        self, conversation: Conversation, console: Console, max_new_tokens: int, max_seq_len: int
    ) -> None:
        self._conversation = conversation
        self._console = console
        self._max_new_tokens = max_new_tokens
        self._max_seq_len = max_seq_len
        self.first: list[Request] = []
        self.later = 0

    def turns(self) -> Iterator[Turn]:
        request = None
        for text in self._console.messages():
            if request is None:
                ids = self._conversation.ask(text)
                (request,) = make_requests([ids], self._max_new_tokens, self._max_seq_len)
            else:
                request = self._conversation.next_request(request, text, self._max_seq_len)
            yield [request], ["" if self._console.interactive else f"> {text}\n"]

    def interrupted(self) -> bool:
        return self._console.interrupted()
