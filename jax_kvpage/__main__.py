"""`python -m jax_kvpage`: the doctor. Reports the build, the machine and the next steps.

`python -m jax_kvpage store PATH` lists, verifies and prunes the files of a store.
"""

import sys

from jax_kvpage._doctor import examine
from jax_kvpage._store_command import run


def main() -> int:
    """Prints the report; returns the exit status."""
    if sys.argv[1:2] == ["store"]:
        return run(sys.argv[2:])
    found = examine()
    width = max(len(name) for name, _ in found.rows)
    for name, value in found.rows:
        print(f"{name:<{width}}  {value}")
    print()
    for line in found.broken or ["All well. Next: examples/decode_llama.py, or README's API."]:
        print(line)
    for line in found.advice:
        print(line)
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
