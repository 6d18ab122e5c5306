"""Registers, spills and shared memory of each CUDA kernel, from the output of ptxas -v.

record COMMAND...   runs the compiler and saves the output of ptxas next to the object file
table FOLDER        prints a row for each kernel with saved output in the folder
    --refuse-spills REGEX   exit status 1 if a kernel whose name it finds spills registers
    --json FILE             also writes the rows
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

SUFFIX = ".ptxas"  # of the report stored next to each object


@dataclasses.dataclass
class Kernel:
    """One kernel compiled for one architecture; sizes in bytes."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    barriers: int = 0


def record(command: list[str]) -> int:
    """Runs a compiler command and returns its exit status.

    ptxas writes its report and its warnings to the same stream: the report is saved to a file, and
    the rest is passed on, so that warnings stay visible.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    notes: list[str] = []
    is_note = False
    for line in done.stderr.splitlines(keepends=True):
        # A continued note is indented.
        is_note = line.startswith("ptxas info") or (is_note and line.startswith("    "))
        if is_note:
            notes.append(line)
        else:
            sys.stderr.write(line)
    if "-o" in command and done.returncode == 0 and notes:
        output = pathlib.Path(command[command.index("-o") + 1])
        output.with_name(output.name + SUFFIX).write_text("".join(notes))
    return done.returncode


def parse(text: str) -> list[Kernel]:
    """Returns the kernels in the output of ptxas, without device functions."""
    kernels: list[Kernel] = []
    current: Kernel | None = None
    properties_of = ""
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            current = Kernel(found[1], found[2])
            kernels.append(current)
        elif found := re.search(r"Function properties for (\S+)", line):
            properties_of = found[1]
        elif current is None:
            continue
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if properties_of == current.name:
                current.stack, current.spill_stores, current.spill_loads = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            for name, pattern in (("shared", r"(\d+) bytes smem"), ("barriers", r"(\d+) barriers")):
                if number := re.search(pattern, line):
                    setattr(current, name, int(number[1]))
    return kernels


def demangled(names: list[str]) -> list[str]:
    """Returns names as in the source, without parameters; unchanged if there is no c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").replace("kvpage::cuda::", "")
    name = re.sub(r"\((?:int|bool|unsigned int|long|kvpage::\w+)\)", "", name)
    # Cut the parameter list, which starts at the first parenthesis outside of <>.
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and index > 0:
            name = name[:index]
            break
    return name.removeprefix("void ")


def table(kernels: list[Kernel]) -> str:
    """Returns a readable table with one row per kernel and architecture."""
    heads = ("kernel", "for", "registers", "spilled", "stack", "shared")
    rows = [
        (
            k.name,
            k.architecture,
            str(k.registers),
            str(k.spill_stores + k.spill_loads),
            str(k.stack),
            str(k.shared),
        )
        for k in sorted(kernels, key=lambda k: (k.name, k.architecture))
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command line tool and returns the exit status."""
    if arguments[:1] == ["record"]:
        return record(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["table"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--refuse-spills", type=re.compile, metavar="REGEX")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args(arguments)
    kernels = [
        kernel
        for path in sorted(options.folder.rglob(f"*{SUFFIX}"))
        for kernel in parse(path.read_text())
    ]
    for kernel, name in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        kernel.name = name
    if not kernels:
        print(f"no notes of ptxas in {options.folder}: build with -DJAX_KVPAGE_CUDA_REPORT=ON")
        return 1
    print(table(kernels))
    if options.json:
        rows = [dataclasses.asdict(kernel) for kernel in kernels]
        options.json.write_text(json.dumps(rows, indent=1))
    if options.refuse_spills:
        named = [k for k in kernels if options.refuse_spills.search(k.name)]
        spilling = [k for k in named if k.spill_stores + k.spill_loads]
        pattern = options.refuse_spills.pattern
        print(f"{len(named)} kernels match {pattern!r}, {len(spilling)} of them spill registers")
        if spilling or not named:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
