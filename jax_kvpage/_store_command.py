"""`python -m jax_kvpage store PATH`: lists, verifies and prunes the files of a store."""

import argparse
import re
import sys
import time
from collections.abc import Sequence

from jax_kvpage.errors import KVPageError
from jax_kvpage.store import StoredFile, list_files, prune

__all__ = ["run"]

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"wanted an age such as 90s, 45m, 12h or 30d, got {text}")
    return float(found[1]) * _SECONDS[found[2]]


def _ago(seconds: float) -> str:
    unit = next((u for u in ("d", "h", "m") if seconds >= _SECONDS[u]), "s")
    return f"{max(seconds, 0) / _SECONDS[unit]:.0f}{unit} ago"


def _row(file: StoredFile) -> tuple[str, ...]:
    size, used = f"{file.bytes / 2**20:.1f} MiB", _ago(time.time() - file.used)
    if file.problem is not None:
        return file.name, size, used, file.problem, "", "", "", ""
    tokens = f"{file.first_token}-{len(file.token_ids)}"
    space = "-" if file.namespace is None else file.namespace
    model = file.fingerprint or "-"
    return file.name, size, used, "sound", tokens, space, model, file.layout


_COLUMNS = ("file", "size", "used", "state", "tokens", "namespace", "fingerprint", "layout")


def _report(files: Sequence[StoredFile]) -> int:
    """Prints the files; returns how many are unusable."""
    rows = [_COLUMNS, *map(_row, files)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    bad = sum(file.problem is not None for file in files)
    size = sum(file.bytes for file in files) / 2**20
    print(f"{len(files)} files, {size:.1f} MiB, {bad} of no use")
    return bad


def run(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit status: 1 if a file is unusable or the directory cannot be read.
    """
    parser = argparse.ArgumentParser(
        "python -m jax_kvpage store",
        description="Lists the files of a BlockStore; checks them; removes some.",
    )
    parser.add_argument("path", help="the store's directory")
    parser.add_argument("--verify", action="store_true", help="read and check all blocks")
    parser.add_argument(
        "--limit",
        help="remove the least recently used files beyond this size, such as 4GiB; 0: all",
    )
    parser.add_argument(
        "--older-than", type=_age, help="remove files that were not used for so long, such as 30d"
    )
    options = parser.parse_args(arguments)
    try:
        if options.limit is not None or options.older_than is not None:
            limit = 0 if options.limit == "0" else options.limit
            removed = prune(options.path, limit=limit, older_than=options.older_than)
            print(f"{len(removed)} files removed")
        bad = _report(list_files(options.path, verify=options.verify))
    except (KVPageError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if bad else 0
