"""The command-line options of decode_llama.py.

This module does not import JAX, so that `--help` and most errors appear immediately.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from .mesh_sizes import MeshSizes
from .prompts import DEFAULT_PROMPTS, InputError

__all__ = [
    "BUNDLED",
    "InputError",
    "make_parser",
    "parse_arguments",
    "plot_problem",
    "positive",
    "talks",
]

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "tiny_llama"
_DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = (*_DTYPES, "int8", "float8_e4m3fn")
_PLOT_ENDINGS = (".png", ".pdf", ".svg")
_LARGEST = 2**31 - 1  # lengths and counts are int32 on the device


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Makes the parser; the help text of each option states its default."""
    parser = _Parser(
        prog="decode_llama.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to generate")
    what.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=BUNDLED,
        metavar="DIR",
        help="Hugging Face model directory (default: the small model of this repository)",
    )
    what.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"prompt to continue; repeatable (default: {len(DEFAULT_PROMPTS)} built-in prompts)",
    )
    what.add_argument(
        "--prompt-file",
        type=pathlib.Path,
        metavar="FILE",
        help="UTF-8 text with one prompt per line, after those of --prompt; blank lines are "
        "skipped (default: none)",
    )
    what.add_argument(
        "--turn",
        action="append",
        default=[],
        metavar="TEXT",
        help="the next message of each conversation; repeatable, each is answered in turn "
        "(default: none)",
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="prompts and turns are messages for the checkpoint's chat template; without --prompt "
        "they come from standard input, one per line, until Ctrl-D (default: text to continue)",
    )
    what.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="maximum number of tokens to generate per prompt (default: %(default)s)",
    )
    what.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature; 0 takes the most likely token (default: 0, and 0.7 for the "
        "built-in prompts with the small model)",
    )
    what.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most likely tokens; 0 for all (default: %(default)s)",
    )
    what.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens that together reach probability P (default: 1, "
        "and 0.9 for the built-in prompts with the small model)",
    )
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the random numbers (default: %(default)s)",
    )
    what.add_argument(
        "--num-samples",
        type=positive,
        default=1,
        metavar="N",
        help="sequences per prompt; the prompt is computed once (default: %(default)s)",
    )
    what.add_argument(
        "--num-beams",
        "--beams",
        type=positive,
        default=1,
        metavar="W",
        help="beam search of width W; 1 for none (default: %(default)s)",
    )

    how = parser.add_argument_group("how to run")
    how.add_argument(
        "--scan",
        type=int,
        default=0,
        metavar="N",
        help="decode steps per compiled program; 0 for jax_kvpage.serving, which runs single "
        "steps (default: %(default)s)",
    )
    how.add_argument(
        "--prompt-lookup",
        type=positive,
        default=0,
        metavar="N",
        help="guess N tokens of each sequence where it repeats itself, and verify them in one step "
        "(default: none)",
    )
    how.add_argument(
        "--draft",
        type=pathlib.Path,
        metavar="DIR",
        help="a smaller model with the same tokens, which guesses 4 tokens of each sequence to be "
        "verified in one step (default: none)",
    )
    how.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="type of weights and arithmetic (default: float32 on CPU, else as stored)",
    )
    how.add_argument(
        "--kv-dtype",
        choices=_KV_DTYPES,
        help="type of stored keys and values (default: as --dtype)",
    )
    how.add_argument(
        "--layout",
        choices=("fused", "per_layer"),
        help="layout of the cache's memory (default: chosen by jax_kvpage for the platform)",
    )
    how.add_argument(
        "--block-tokens",
        type=positive,
        metavar="N",
        help="tokens per block (default: chosen by jax_kvpage; 16 for the small model on CPU)",
    )
    how.add_argument(
        "--capacity",
        metavar="SIZE",
        help='physical memory of the pool, such as "64MiB" or a number of bytes (default: what '
        "all prompts can need together)",
    )
    how.add_argument(
        "--max-slots",
        type=positive,
        metavar="N",
        help="maximum number of sequences that run at once (default: the number of prompts)",
    )
    how.add_argument(
        "--max-seq-len",
        type=positive,
        metavar="N",
        help="maximum length of a sequence in tokens, with its prompt (default: the model's "
        "max_position_embeddings)",
    )
    how.add_argument(
        "--prefill-chunk",
        type=positive,
        default=512,
        metavar="N",
        help="maximum number of prompt tokens per step, at least 16 (default: %(default)s)",
    )
    how.add_argument(
        "--mesh",
        type=MeshSizes.parse,
        default=MeshSizes(),
        metavar="dp=N,tp=N",
        help="tp=N: split heads and weights over N devices; dp=N: split the sequences between N "
        "replicas of the model, each on one device or on tp devices (default: one device)",
    )
    how.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="with --mesh, run as one of --num-processes processes that share the devices; "
        "process 0 listens on this address (default: one process)",
    )
    how.add_argument(
        "--num-processes",
        type=positive,
        default=1,
        metavar="N",
        help="number of processes, all with the same command line except for --process-id "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--process-id",
        type=int,
        default=0,
        metavar="I",
        help="number of this process, from 0; process 0 prints (default: %(default)s)",
    )
    how.add_argument(
        "--implementation",
        choices=("cpu", "cuda", "xla"),
        help="implementation of attention (default: cpu on CPU, cuda on GPU)",
    )

    out = parser.add_argument_group("what to show")
    out.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object and nothing else (default: text as it is generated, then a "
        "table)",
    )
    out.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="FILE",
        help=f"draw memory over time; FILE ends in {', '.join(_PLOT_ENDINGS)} (default: no plot)",
    )
    return parser


def parse_arguments(
    argv: Sequence[str] | None = None, description: str | None = None
) -> argparse.Namespace:
    """Parses the command line; exits with status 2 on a mistake."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.scan < 0:
        parser.error(f"--scan must be 0 (single steps) or more, got {args.scan}")
    option = "--draft" if args.draft else "--prompt-lookup"
    if args.prompt_lookup and args.draft:
        parser.error("--prompt-lookup and --draft exclude each other: leave one of them out")
    if (args.prompt_lookup or args.draft) and (args.scan or args.num_beams > 1):
        parser.error(f"{option} guesses for single steps: leave out --scan and --num-beams")
    if args.mesh.devices > 1 and args.draft:
        parser.error("--mesh runs one model: leave out --draft")
    if args.mesh.dp > 1 and args.scan:
        parser.error("--scan runs one replica: leave out dp or --scan")
    if problem := process_problem(args):
        parser.error(problem)
    if args.num_beams > 1:
        sampled = args.temperature or args.top_k or args.top_p is not None or args.num_samples > 1
        if sampled or args.scan:
            parser.error(
                "--num-beams does not sample and runs single steps: leave out --num-samples, "
                "--temperature, --top-k, --top-p and --scan"
            )
    if args.turn and (args.num_beams > 1 or args.num_samples > 1):
        parser.error("--turn continues after one answer: leave out --num-samples and --num-beams")
    if talks(args):
        if args.turn:
            parser.error("--turn follows a prompt: with --chat, give one with --prompt")
        if args.scan or args.num_beams > 1 or args.num_samples > 1:
            wrong = "leave out --scan, --num-samples and --num-beams"
            parser.error(f"--chat without --prompt streams one answer after the other: {wrong}")
    if args.plot:
        problem = plot_problem(args.plot)
        if problem:
            parser.error(f"--plot {args.plot}: {problem}")
    return args


def talks(args: argparse.Namespace) -> bool:
    """Whether messages are read from standard input."""
    return bool(args.chat and not (args.prompt or args.prompt_file))


def process_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the options for several processes; None if nothing is."""
    count = args.num_processes
    if (args.coordinator is None) != (count == 1):
        return "--coordinator and --num-processes (2 or more) go together"
    if not 0 <= args.process_id < count:
        return f"--process-id must be from 0 to {count - 1}, got {args.process_id}"
    if count > 1 and args.mesh.dp > 1:
        return "the devices of several processes run one replica: leave out dp or --coordinator"
    if count > 1 and args.mesh.tp % count:
        return f"--num-processes {count} must divide the devices of --mesh {args.mesh}"
    if count > 1 and talks(args):
        return "--chat without --prompt reads messages in one process only: leave --coordinator out"
    return None


def plot_problem(file: pathlib.Path) -> str | None:
    """Why a plot could not be written to `file` at the end of the run; None if it can be."""
    if file.suffix not in _PLOT_ENDINGS:
        return f"the name must end in one of {', '.join(_PLOT_ENDINGS)}"
    if importlib.util.find_spec("matplotlib") is None:
        return "needs matplotlib (pip install matplotlib)"
    try:
        if not file.absolute().parent.is_dir():
            return f"there is no directory {file.absolute().parent}"
        # Permissions are not enough (read-only and special file systems), so open the file.
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def positive(text: str) -> int:
    """Parses an integer of 1 or more; an argparse type."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    if value > _LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {_LARGEST}, got {value}")
    return value
