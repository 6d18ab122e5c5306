"""Checks of the compiled CUDA kernels that need no GPU.

    check_code.py FOLDER    with objects that were built with -DJAX_KVPAGE_CUDA_REPORT=ON

From the machine code (cuobjdump and nvdisasm must be on PATH, next to nvcc, or installed in this
Python as nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm):
  - A kernel that may overlap its predecessor waits for it before it touches global memory, on every
    path; so does its PTX, and no PTX targets an architecture without such a wait.
  - No load is non-coherent (LDG.CONSTANT): kernels read what the kernel before them wrote.
  - The tile loop of decode has no more instructions than its budget.
From the output of ptxas (resource_usage.py): registers, spills and static shared memory stay within
their budgets. Launches use at most a block's limit minus MAX_STATIC_SHARED (attend.cu) as dynamic
shared memory, so that both together fit.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import resource_usage

# kMaxStaticSharedBytes in launch.cuh.
MAX_STATIC_SHARED = 1024
# Compute capability 9.0 has the wait (programmatic dependent launch).
OLDEST_OVERLAP = 90


@dataclasses.dataclass(frozen=True)
class Budget:
    """Resource limits of the kernels whose name matches the pattern.

    Attributes:
        pattern: must match the whole name.
        overlaps: whether they are launched with LaunchShape::overlap.
        registers: per thread.
        spills: bytes of stores and loads together.
        tile: instructions of the loop over tiles; None if there is no such loop.
    """

    pattern: str
    overlaps: bool
    registers: int
    spills: int = 0
    tile: int | None = None


# Every kernel matches exactly one row. The numbers are those of sm_90a with nvcc 13.0, rounded up.
BUDGETS = [
    Budget(r"AppendKernel<.*>", True, 32),
    Budget(r"QuantizeKernel<.*>", True, 48),
    Budget(r"GatherKernel<.*>", True, 64),
    Budget(r"CopyTokensKernel<.*>", True, 64),
    Budget(r"CopyKernel", False, 48),
    Budget(r"CountOutKernel", False, 32),
    Budget(r"PlanCheckedKernel", True, 64),
    Budget(r"PlanKernel", False, 64),
    Budget(r"BatchCheckKernel", False, 64),  # copies a whole KVView
    Budget(r"RotateKernel<(?!Int8).*>", True, 72),
    # The flag that says whether a layer's keys are rotated: stored once, read once per row.
    Budget(r"RotateKernel<Int8>", True, 72, spills=8),
    Budget(r"(Advance|Change|Edit|Reuse|TableCheck)Kernel(<.*>)?", False, 64),
    # 80 of these instructions find and load what a group has computed, once per unit rather than
    # per tile. Larger heads fit them into their budgets.
    Budget(r"DecodeKernel<.*, 64>", True, 255, tile=3250),
    Budget(r"DecodeKernel<.*, 128>", True, 255, tile=4700),
    Budget(r"DecodeKernel<.*, 256>", True, 255, tile=4850),
    Budget(r"DecodeQuantizedKernel<.*, 64>", True, 255, tile=4150),
    Budget(r"DecodeQuantizedKernel<.*, 128>", True, 255, tile=5250),
    Budget(r"DecodeQuantizedKernel<.*, 256>", True, 255, tile=4300),
    Budget(r"GroupedKernel<.*, 64>", True, 168),
    Budget(r"GroupedKernel<.*, 128>", True, 208),
    Budget(r"GroupedKernel<.*, 256>", True, 208),
    Budget(r"PrefillKernel<.*, 64>", True, 255),
    Budget(r"PrefillKernel<.*, 128>", True, 255, spills=40),
    Budget(r"PrefillKernel<.*, 256>", True, 255, spills=224),
    Budget(r"GeneralKernel<.*>", True, 216),
]

_GLOBAL = re.compile(
    r"(LDG|LD|STG|ST|LDGSTS|ATOM|ATOMG|RED|UBLKCP|UTMA\w*|CCTL)(\.|$)"
)  # includes generic accesses
_NON_COHERENT = re.compile(r"LDG?\..*(CONSTANT|\bCI\b)")
_PTX_GLOBAL = re.compile(r"\s*(@\S+\s+)?(ld|st|atom|red|cp\.async)\.(?!param|shared|local|const)")


@dataclasses.dataclass
class Instruction:
    """One instruction of a kernel."""

    address: int
    predicated: bool
    opcode: str
    operands: str

    def targets(self) -> list[int]:
        """Returns the addresses that it may jump to."""
        jumps = ("BRA", "BSSY", "CALL", "JMP", "BRX", "JMX")
        if not self.opcode.startswith(jumps):
            return []
        return [int(word, 16) for word in re.findall(r"\b0x[0-9a-f]+\b", self.operands)]

    def falls_through(self) -> bool:
        """Returns whether execution may continue with the next instruction."""
        ends = ("BRA", "EXIT", "RET", "JMP", "BRX", "JMX")
        return self.predicated or not self.opcode.startswith(ends)


def find_tool(name: str) -> str | None:
    """Finds a program of the CUDA toolkit."""
    if found := shutil.which(name):
        return found
    folders = [pathlib.Path(p) / "nvidia" for p in sys.path]
    found_here = [path for f in folders if f.is_dir() for path in sorted(f.glob(f"*/bin/{name}"))]
    if nvcc := shutil.which("nvcc"):
        found_here.append(pathlib.Path(nvcc).resolve().with_name(name))
    return next((str(path) for path in found_here if path.exists()), None)


def disassemble(tools: list[str], options: list[str], path: pathlib.Path) -> str:
    """Returns the output of cuobjdump for an object file."""
    folders = [str(pathlib.Path(tool).parent) for tool in tools]
    environment = os.environ | {"PATH": os.pathsep.join([*folders, os.environ["PATH"]])}
    done = subprocess.run(
        [tools[0], *options, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{tools[0]} {options} {path}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each kernel, by mangled name."""
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            current = kernels.setdefault(found[1], [])
        elif found := re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line
        ):
            current.append(Instruction(int(found[1], 16), bool(found[2]), found[3], found[4]))
    return kernels


def access_without_wait(code: list[Instruction]) -> Instruction | None:
    """Finds a global access that some path reaches before the wait."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    seen, open_ends = {0}, [0]
    while open_ends:
        i = open_ends.pop()
        instruction = code[i]
        if instruction.opcode.startswith("ACQBULK") and not instruction.predicated:
            continue
        if _GLOBAL.match(instruction.opcode):
            return instruction
        follow = [place[to] for to in instruction.targets() if to in place]
        if instruction.falls_through() and i + 1 < len(code):
            follow.append(i + 1)
        for to in follow:
            if to not in seen:
                seen.add(to)
                open_ends.append(to)
    return None


def tile_loop(code: list[Instruction]) -> int:
    """Counts the instructions of the smallest loop that requests and multiplies tiles, or 0."""
    sizes = []
    for last, instruction in enumerate(code):
        for target in instruction.targets() if instruction.opcode.startswith("BRA") else []:
            body = [i for i in code[: last + 1] if i.address >= target]
            opcodes = {i.opcode.split(".")[0] for i in body}
            if target < instruction.address and opcodes >= {"HMMA", "LDGSTS"}:
                sizes.append(len(body))
    return min(sizes, default=0)


def check_ptx(text: str) -> list[str]:
    """Returns what is wrong with the PTX of an object file."""
    wrong: list[str] = []
    target, entry, waited, accessed = 0, "", False, False
    for line in text.splitlines():
        if found := re.match(r"\s*\.target sm_(\d+)", line):
            target = int(found[1])
            if target < OLDEST_OVERLAP:
                wrong.append(f"PTX for sm_{target} has no wait: ship that of {OLDEST_OVERLAP}")
        elif found := re.search(r"\.entry (\S+)\(", line):
            entry, waited, accessed = found[1], False, False
        elif "griddepcontrol.wait" in line:
            waited = True
        elif entry and not waited and not accessed and _PTX_GLOBAL.match(line):
            accessed = True
            if find_budget(entry_name(entry)).overlaps and target >= OLDEST_OVERLAP:
                wrong.append(f"{entry_name(entry)}: PTX accesses memory before it waits: {line}")
    return wrong


def entry_name(mangled: str) -> str:
    """Returns the kernel's name in the source."""
    return resource_usage.demangled([mangled])[0]


def find_budget(name: str) -> Budget:
    """Returns the row of BUDGETS for this kernel."""
    rows = [budget for budget in BUDGETS if re.fullmatch(budget.pattern, name)]
    if len(rows) != 1:
        raise RuntimeError(
            f"{name} has {len(rows)} rows in BUDGETS ({__file__}): give a new kernel one"
        )
    return rows[0]


def check_sass(name: str, code: list[Instruction]) -> list[str]:
    """Returns what is wrong with a kernel's machine code."""
    wrong = []
    budget = find_budget(name)
    waits = any(i.opcode.startswith("ACQBULK") for i in code)
    if budget.overlaps and not waits:
        wrong.append(f"{name} is launched with overlap but never waits")
    elif waits and not budget.overlaps:
        wrong.append(f"{name} waits, but its row in BUDGETS says that it does not overlap")
    elif budget.overlaps and (access := access_without_wait(code)):
        wrong.append(
            f"{name} accesses global memory before it waits: {access.opcode} {access.operands} "
            f"at {access.address:#x}"
        )
    for i in code:
        if _NON_COHERENT.match(i.opcode):
            wrong.append(f"{name} has a non-coherent load: {i.opcode} at {i.address:#x}")
            break
    if budget.tile is not None:
        size = tile_loop(code)
        print(f"{name}: {size} instructions in the loop over tiles, at most {budget.tile}")
        if not 0 < size <= budget.tile:
            wrong.append(f"{name}: the loop over tiles has {size} instructions")
    return wrong


def check_resources(kernel: resource_usage.Kernel) -> list[str]:
    """Returns which budgets a kernel exceeds: registers, spills, static shared memory."""
    budget = find_budget(kernel.name)
    spills = kernel.spill_stores + kernel.spill_loads
    taken = [
        ("registers", kernel.registers, budget.registers),
        ("bytes of spills", spills, budget.spills),
        ("bytes of static shared memory", kernel.shared, MAX_STATIC_SHARED),
    ]
    return [
        f"{kernel.name} ({kernel.architecture}) takes {have} {what}, at most {most} are planned"
        for what, have, most in taken
        if have > most
    ]


def main(arguments: list[str]) -> int:
    """Runs the command line tool and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(arguments).folder
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")]
    if None in tools:
        print("missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 1
    programs = [tool for tool in tools if tool]
    notes = [
        kernel
        for path in sorted(folder.rglob(f"*{resource_usage.SUFFIX}"))
        for kernel in resource_usage.parse(path.read_text())
        if kernel.architecture.startswith(f"sm_{OLDEST_OVERLAP}")
    ]
    wrong: list[str] = []
    for kernel in notes:
        kernel.name = entry_name(kernel.name)
        wrong += check_resources(kernel)
    checked = 0
    for path in sorted(folder.rglob("*.cu.o")):
        sass = disassemble(programs, ["-sass", "-arch", f"sm_{OLDEST_OVERLAP}a"], path)
        for mangled, code in parse_sass(sass).items():
            checked += 1
            wrong += check_sass(entry_name(mangled), code)
        wrong += check_ptx(disassemble(programs, ["-ptx"], path))
    unused = {b.pattern for b in BUDGETS} - {find_budget(kernel.name).pattern for kernel in notes}
    wrong += [f"no kernel has a name like {pattern}: drop its row" for pattern in sorted(unused)]
    print(f"{checked} kernels disassembled, notes of {len(notes)}, {len(wrong)} findings")
    if not checked or checked != len(notes):
        wrong.append("each kernel must have machine code for sm_90a, and notes of ptxas")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
