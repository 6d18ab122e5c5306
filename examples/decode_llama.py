"""Generates text with a Llama model whose KV cache is mapped block by block as it grows.

    python examples/decode_llama.py                     # the small model of this repository
    python examples/decode_llama.py --prompt "The module" --temperature 0.8 --seed 3
    python examples/decode_llama.py --prompt "The module" --temperature 0.8 --num-samples 8
    python examples/decode_llama.py --prompt "The module" --num-beams 4
    python examples/decode_llama.py --prompt "The module" --prompt-lookup 3
    python examples/decode_llama.py --prompt "The module" --turn "If it" --turn "In this case"
    python examples/decode_llama.py --prompt "The module" --mesh tp=2
    python examples/decode_llama.py --prompt "The module" --prompt "A class" --mesh dp=2
    python examples/decode_llama.py --prompt "The module" --mesh tp=2 \\
        --coordinator localhost:1234 --num-processes 2 --process-id 0  # and another: --process-id 1
    python examples/decode_llama.py --checkpoint DIR --chat
    python examples/decode_llama.py --checkpoint DIR --prompt "Once upon a time" --scan 16

DIR is a directory with a Hugging Face model of a Llama-like architecture: config.json, safetensors,
tokenizer.json. `hf download ORG/NAME --local-dir DIR` (pip install huggingface_hub) downloads one
from the Hub. Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and SmolLM3 are supported, with weights
in float32, bfloat16 or float16, and RoPE default, linear, dynamic, yarn or llama3. Everything else
is refused before the weights are read: other architectures, quantized weights, longrope and partial
RoPE, and additional weights such as a bias of the output layer.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    0 means success, 1 a failure of the system (such as a full disk), 2 a mistake in the input, 130
    an interrupt, and 141 a pipe closed by its reader (the last two as shells report signals). All
    except 0 come with one line on standard error.
    """
    with _imports():
        from llama.arguments import InputError, parse_arguments
    try:
        if sys.stdout is not None and sys.stdout.errors == "strict":
            # Show characters that the terminal's encoding lacks as escapes.
            sys.stdout.reconfigure(errors="backslashreplace")
        args = parse_arguments(argv, __doc__)
        if args.mesh.devices > 1 and "jax" not in sys.modules:
            # If JAX finds no other devices, it splits the CPU into this many.
            own = args.mesh.devices // args.num_processes
            flag = f"--xla_force_host_platform_device_count={own}"
            os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".rstrip()
        # Only after the options were parsed, because JAX takes a second or two to import.
        with _imports():
            from llama.processes import join
            from llama.run import run

        if args.coordinator:
            join(args)
        run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()
        return _fail("standard output was closed", 141)
    except InputError as error:
        return _fail(f"error: {error}", 2)
    except ImportError as error:
        return _fail(f"error: {error}; `pip install '.[examples]'` installs all that is needed", 1)
    except OSError as error:
        if error.filename is not None:  # such as a checkpoint that this user may not read
            return _fail(f"error: {error}", 2)
        _drop_output()
        return _fail(f"error: {error}", 1)
    return 0


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Exits immediately on an interrupt: extension modules turn a KeyboardInterrupt during their
    import into other errors or tracebacks, and there is nothing to clean up yet."""

    def leave(*_: object) -> None:
        os.write(2, b"decode_llama.py: interrupted\n")
        os._exit(130)

    # Otherwise it is ignored, as in a background job, or the caller handles it.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail(message: str, status: int) -> int:
    print(f"decode_llama.py: {' '.join(message.split())}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Discards the rest of standard output; otherwise Python would fail to write it again at
    exit."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except (OSError, AttributeError):
        pass  # standard output was replaced, as in tests


if __name__ == "__main__":
    sys.exit(main())
