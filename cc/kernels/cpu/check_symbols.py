"""Checks that the objects of one instruction set define no symbols that other code could use.

    python cc/kernels/cpu/check_symbols.py BUILD

BUILD is an object, an archive of objects or a folder with them at any depth. Every object that is
compiled from `isa/SET.cc` may define external symbols in the namespace `kvpage::cpu::SET` only.
Any other one, most of all a weak one from a template or an inline function, could be the copy that
the linker keeps for the whole program: code with the set's instructions would then run on machines
that lack them. The exit status is 1 if there is such a symbol, or if a set's object is missing.
"""

import argparse
import pathlib
import re
import subprocess
import sys

_SETS = sorted(path.stem for path in pathlib.Path(__file__).with_name("isa").glob("*.cc"))


def _objects(build: pathlib.Path) -> list[pathlib.Path]:
    """Returns the objects and archives to look at."""
    if build.is_file():
        return [build]
    objects = [p for p in build.rglob("*.o") if p.match("kernels/cpu/isa/*.o")]
    return objects or list(build.rglob("libkvpage_cpu_kernels.a"))


def _own(name: str, instruction_set: str) -> bool:
    """Whether what a mangled name stands for is in the set's namespace."""
    scope = f"6kvpage3cpu{len(instruction_set)}{instruction_set}"
    return re.match(rf"_Z(T[VTIS]|GV|GR|Z)*N[KVRO]*{scope}", name) is not None


def _demangle(name: str) -> str:
    return subprocess.run(
        ["c++filt", name], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    """Prints what is wrong; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", type=pathlib.Path)
    build = parser.parse_args().build
    seen: dict[str, int] = {}
    wrong = []
    for path in _objects(build):
        command = [
            "nm",
            "--defined-only",
            "--extern-only",
            "--print-file-name",
            "--portability",
            str(path),
        ]
        for line in subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            # "folder/avx2.cc.o: NAME TYPE VALUE SIZE", or "folder/lib.a[avx2.cc.o]: NAME ..."
            place, _, symbol = line.partition(": ")
            match = re.search(r"([^/\[]+)\.(cc|cpp)\.o\]?$", place)
            if match is None or match[1] not in _SETS:
                continue
            name, kind = symbol.split()[:2]
            if name.startswith("DW.ref."):  # pointer used by exception tables, not code
                continue
            seen[match[1]] = seen.get(match[1], 0) + 1
            if not _own(name, match[1]):
                wrong.append(f"{place}: {kind} {_demangle(name)}")
    missing = [name for name in _SETS if name not in seen]
    if missing:
        print(f"no objects in {build} for: {', '.join(missing)}")
    if wrong:
        print("external symbols outside the namespace of the instruction set that defines them:")
        print(*wrong, sep="\n")
    if missing or wrong:
        return 1
    print(f"{', '.join(_SETS)}: all external symbols are in the namespace of their set")
    return 0


if __name__ == "__main__":
    sys.exit(main())
