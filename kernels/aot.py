"""Compile every Triton kernel for cards that are not here, and hold what the compilers say against `golden_aot.csv`.

    python -m kernels.aot                                  # the table, and what differs from the golden file
    python -m kernels.aot --op eigen_scan --target sm_90   # a part of it
    python -m kernels.aot --write                          # take the table as the new golden file

The launchers run on tensors without data; what they would launch (kernel, argument types, block sizes, warps) is what
gets compiled. No GPU is needed: ptxas and the AMD backend come with the triton package.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.cases import OPS
from kernels.dispatch import Launch, recording

GOLDEN = Path(__file__).with_name("golden_aot.csv")
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
# Of one program: GeForce Blackwell and Ada have the least of the NVIDIA cards, and an MI300 has 64 KiB.
SHARED_LIMIT = {name: 65536 if name == "gfx942" else 101376 for name in TARGETS}
DTYPES = (torch.float32, torch.bfloat16)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Row:
    kernel: str
    config: str
    target: str
    registers: int  # a thread
    spills: int  # bytes of local memory a thread
    shared_bytes: int  # a program
    vector_width: int  # bytes of the widest load from global memory


# ---- from a launch to what Triton compiles -------------------------------------------------------------------------


def specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes, by the rules Triton's own launcher goes by."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        by_value = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (by_value and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if by_value and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def recorded(ops: list[str] | None = None) -> Iterator[tuple[str, Launch]]:
    """(config, launch) for every kernel of every case, each specialisation of a kernel once."""
    seen = set()
    for op in ops or OPS:
        for dtype in DTYPES:
            for case in OPS[op]("meta", dtype):
                with recording() as launches:
                    case.run()
                for launch in launches:
                    key = launch.kernel.__name__, str(specialised(launch)), str(launch.options)
                    if key not in seen:
                        seen.add(key)
                        yield f"{TYPES[dtype]} {case.config}".strip(), launch


# ---- what the compilers say ----------------------------------------------------------------------------------------


def compiled(launch: Launch, target: str, config: str = "") -> Row:
    signature, constants, attributes = specialised(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[target], options=launch.options)
    measure = _amd if target.startswith("gfx") else _nvidia
    return Row(launch.kernel.__name__, config, target, *measure(binary.asm), binary.metadata.shared, _width(binary.asm))


def _nvidia(asm: Mapping) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd(asm: Mapping) -> tuple[int, int]:
    def found(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[0])

    return found("vgpr_count"), 4 * (found("vgpr_spill_count") + found("sgpr_spill_count"))


def _width(asm: Mapping) -> int:
    if "ptx" in asm:
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", asm["ptx"])
        return max((int(count or 1) * int(size) // 8 for count, size in loads), default=0)
    names = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short_d16": 2, "ubyte": 1}
    loads = re.findall(r"(?:global|buffer)_load_(\w+)", asm["amdgcn"])
    return max((names.get(load.removesuffix("_hi"), 0) for load in loads), default=0)


# ---- the golden file -----------------------------------------------------------------------------------------------


def read_golden() -> tuple[str, dict[tuple[str, str, str], Row]]:
    """The triton version of the golden file, and its rows by (kernel, config, target)."""
    with GOLDEN.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = {}
    for row in rows:
        name, numbers = (row["kernel"], row["config"], row["target"]), (int(row[f.name]) for f in fields(Row)[3:])
        kept[name] = Row(*name, *numbers)
    return rows[0]["triton"], kept


def read_traffic() -> dict[tuple[str, str], float]:
    """Bytes moved over their minimum by (kernel, config), of the golden file."""
    with GOLDEN.open(newline="") as file:
        return {(r["kernel"], r["config"]): float(r["traffic"]) for r in csv.DictReader(file) if r["traffic"]}


def write_golden(table: list[Row]) -> None:
    command, environment = [sys.executable, "-m", "kernels.traffic"], os.environ | {"TRITON_INTERPRET": "1"}
    audit = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    ratios = {(kernel, f"fp32 {config}".strip()): moved / least for kernel, config, moved, least in json.loads(audit)}
    with GOLDEN.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(f.name for f in fields(Row)), "traffic", "triton"])
        for row in sorted(table, key=astuple):
            ratio = ratios.get((row.kernel, row.config))
            writer.writerow([*astuple(row), "" if ratio is None else f"{ratio:.3f}", triton.__version__])


def faults(row: Row) -> list[str]:
    """What a kernel may not do on any card, as sentences."""
    name = f"{row.kernel} ({row.config}) on {row.target}"
    found = [f"{name} spills {row.spills} bytes a thread"] if row.spills else []
    if row.shared_bytes > SHARED_LIMIT[row.target]:
        found.append(f"{name} takes {row.shared_bytes} bytes of shared memory of {SHARED_LIMIT[row.target]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default: all")
    parser.add_argument("--write", action="store_true", help="replace the golden file (needs all ops and targets)")
    arguments = parser.parse_args()
    if arguments.write and (arguments.op or arguments.target):
        parser.error("--write takes the whole table: leave out --op and --target")
    golden = {} if arguments.write or not GOLDEN.exists() else read_golden()[1]
    table = []
    for config, launch in recorded(arguments.op):
        for target in arguments.target or TARGETS:
            row = compiled(launch, target, config)
            table.append(row)
            before = golden.get((row.kernel, row.config, row.target))
            print(*asdict(row).values(), "" if before in (None, row) else f"was {before}", *faults(row), flush=True)
    if arguments.write:
        write_golden(table)


if __name__ == "__main__":
    main()
