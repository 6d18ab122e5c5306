"""Several processes (`--coordinator`): each has a part of the mesh's devices."""

import argparse
import os
import sys

import jax

from .prompts import InputError

__all__ = ["join"]

# Seconds until the death of a process is noticed and the others exit.
_HEARTBEAT = 10
_MEETING = 60


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of the command line. Only the first prints.

    Raises:
      InputError: The others do not join, or the coordinator does not answer.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=_MEETING,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_MEETING,
        )
    except RuntimeError as error:
        raise InputError(f"--coordinator {args.coordinator}: {error}") from error
    _print_in_first(args.process_id == 0)


def _print_in_first(first: bool) -> None:
    """Reserves standard output for the text of the first process: JAX's libraries write there
    too."""
    own = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(2, 1)
    old = sys.stdout
    sys.stdout = open(own, "w", encoding=old.encoding, errors=old.errors)  # noqa: SIM115
