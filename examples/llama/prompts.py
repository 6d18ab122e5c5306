"""The prompts and turns of the command line, and the error for mistakes in them.

Like arguments.py, this module does not import JAX.
"""

import argparse

__all__ = ["DEFAULT_PROMPTS", "InputError", "read_prompts", "read_turns", "valid_text"]

DEFAULT_PROMPTS = (
    "This function is called when",
    "If the file does not exist,",
    "A class is",
    "When a function is called,",
)


class InputError(ValueError):
    """A mistake in the arguments that is found only when they are used."""


def valid_text(name: str, text: str) -> str:
    """Converts text from the command line or standard input to valid Unicode. Python decodes bytes
    that are invalid in the locale's encoding to lone surrogates; usually they are UTF-8 in a C
    locale.

    Raises:
      InputError: They are not UTF-8; the message begins with `name`.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise InputError(f"{name} {text!a} is not valid UTF-8") from error


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Reads the prompts of the command line, then those of the file; the built-in ones if none.

    Raises:
      InputError: A prompt that is not valid text, or a file that cannot be read or is blank.
    """
    prompts = [valid_text("--prompt", prompt) for prompt in args.prompt]
    if args.prompt_file:
        try:
            text = args.prompt_file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"--prompt-file: {error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--prompt-file {args.prompt_file} is not UTF-8: {error}") from error
        # Not str.splitlines(): it also splits at U+2028, form feed and others, which are text.
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise InputError(f"--prompt-file {args.prompt_file} holds no prompts")
        prompts += lines
    return prompts or list(DEFAULT_PROMPTS)


def read_turns(args: argparse.Namespace) -> list[str]:
    """Reads the later turns of the conversations.

    Raises:
      InputError: A turn that is not valid text.
    """
    return [valid_text("--turn", turn) for turn in args.turn]
