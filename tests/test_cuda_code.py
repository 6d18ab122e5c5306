"""cc/kernels/cuda/check_code.py, run on code written for this test."""

import importlib
import pathlib
import types
from typing import Any

import pytest

_FOLDER = pathlib.Path(__file__).parents[1] / "cc" / "kernels" / "cuda"
_WAIT, _LOAD, _EXIT = "ACQBULK", "LDG.E R2, desc[UR4][R2.64]", "EXIT"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(_FOLDER))
    return importlib.import_module("check_code")


def _sass(check: Any, *lines: str) -> Any:
    text = "\t\tFunction : kernel\n" + "".join(
        f"        /*{16 * i:04x}*/                   {line} ;  /* 0x00000a00ff017b82 */\n"
        f"                                                  /* 0x000fe20000000800 */\n"
        for i, line in enumerate(lines)
    )
    code = check.parse_sass(text)["kernel"]
    assert [i.address for i in code] == [16 * n for n in range(len(lines))]
    return code


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([_WAIT, _LOAD, _EXIT], []),
        (["LDC R1, c[0x0][0x28]", "STS [R1], RZ", "BAR.SYNC 0x0", _WAIT, _LOAD, _EXIT], []),
        (["@P0 EXIT", _WAIT, _LOAD, _EXIT], []),
        ([_LOAD, _WAIT, _EXIT], ["accesses global memory before it waits: LDG.E"]),
        (["@P0 BRA 0x20", _WAIT, _LOAD, _EXIT], ["before it waits: LDG.E"]),
        (["@P0 ACQBULK", _LOAD, _EXIT], ["before it waits: LDG.E"]),
        (["BRA 0x30", _LOAD, _EXIT, _WAIT, "BRA 0x10"], []),
        (["LDGSTS.E [R1], desc[UR4][R2.64]", _WAIT, _EXIT], ["before it waits: LDGSTS.E"]),
        (["ST.E desc[UR4][R2.64], R1", _WAIT, _EXIT], ["before it waits: ST.E"]),
        ([_LOAD, _EXIT], ["never waits"]),
        ([_WAIT, "LDG.E.CONSTANT R2, desc[UR4][R2.64]", _EXIT], ["non-coherent load: LDG.E.CON"]),
    ],
)
def test_waits_and_loads(check: Any, lines: list[str], wrong: list[str]) -> None:
    found = check.check_sass("GatherKernel<float, 1>", _sass(check, *lines))
    assert len(found) == len(wrong)
    assert all(part in text for part, text in zip(wrong, found, strict=True))


def test_a_wait_is_an_overlap(check: Any) -> None:
    (wrong,) = check.check_sass("CopyKernel", _sass(check, _WAIT, _LOAD, _EXIT))
    assert "does not overlap" in wrong


def test_the_loop_over_tiles(check: Any) -> None:
    tile = ["LDGSTS.E [R1], desc[UR4][R2.64]", *["FADD R1, R1, R1"] * 50, "HMMA.16816 R4, R8"]
    code = [_WAIT, "FADD R1, R1, R1", "@P1 BRA 0x10", *tile, "@P0 BRA 0x30", _EXIT]
    assert check.tile_loop(_sass(check, *code)) == len(tile) + 1
    assert not check.check_sass("DecodeKernel<__half, 64>", _sass(check, *code))
    long = [*code[:4], *["FADD R1, R1, R1"] * 3300, *code[4:]]
    (wrong,) = check.check_sass("DecodeKernel<__half, 64>", _sass(check, *long))
    assert "instructions" in wrong
    (wrong,) = check.check_sass("DecodeKernel<__half, 64>", _sass(check, _WAIT, _LOAD, _EXIT))
    assert "0 instructions" in wrong


def test_ptx(check: Any) -> None:
    def ptx(target: str, *lines: str) -> Any:
        return check.check_ptx(
            "\n".join([f".target {target}", ".visible .entry PlanCheckedKernel(", *lines])
        )

    wait, load = "\tgriddepcontrol.wait;", "\tld.global.u32 \t%r1, [%rd1];"
    assert not ptx("sm_90", "\tld.param.u64 \t%rd1, [p];", wait, load)
    assert "before it waits" in ptx("sm_90", load, wait)[0]
    assert "before it waits" in ptx("sm_90", "\tst.v4.f32 [%rd1], {%f1};", wait)[0]
    assert "sm_80 has no wait" in ptx("sm_80", load)[0]


def test_budgets(check: Any) -> None:
    kernel = check.resource_usage.Kernel("PlanKernel", "sm_90a", registers=64, shared=1024)
    assert not check.check_resources(kernel)
    kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.shared = 88, 4, 8, 2048
    registers, spills, shared = check.check_resources(kernel)
    assert "takes 88 registers, at most 64" in registers
    assert "takes 12 bytes of spills, at most 0" in spills
    assert "takes 2048 bytes of static shared memory" in shared
    with pytest.raises(RuntimeError, match="NewKernel has 0 rows in BUDGETS"):
        check.find_budget("NewKernel")


def test_the_limits_are_those_of_the_launches(check: Any) -> None:
    text = (_FOLDER / "launch.cuh").read_text()
    assert f"kMaxStaticSharedBytes = {check.MAX_STATIC_SHARED};" in text
    text = (_FOLDER / "launch.cu").read_text()
    assert f"kOldestOverlap = {check.OLDEST_OVERLAP};" in text
