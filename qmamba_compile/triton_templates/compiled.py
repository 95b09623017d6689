"""What a compiler makes of a rendered kernel, for any architecture, on a machine without a GPU.

Counts are of machine instructions in the order of their addresses; a loop whose trip count is known from the kernel
counts its body that many times. They say how many instructions a warp issues, not how long it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..errors import ConfigError
from .render import load
from .state_specs import StateSpec


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one compiled kernel.

    Attributes:
        registers: of a thread (VGPRs on AMD).
        spills: bytes of a thread's stack, or registers spilled (AMD).
        local_accesses: loads and stores of thread-local memory.
        shared_bytes: shared memory of a program.
        accesses: width in bytes and name of each global access: {("load", 16): 4, ...}.
        instructions: instructions that one warp issues, given the loops' trip counts.
        mix: the same by kind of instruction.
    """

    registers: int
    spills: int
    local_accesses: int
    shared_bytes: int
    accesses: Mapping[tuple[str, int], int]
    instructions: int
    mix: Mapping[str, int]


def compile_kernel(
    module: ModuleType,
    name: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    warps: int,
    stages: int = 2,
) -> Any:
    """Compile a rendered kernel for ``target``, as Triton's launcher would for 16-byte aligned arguments.

    Args:
        signature: Triton's type of each argument, such as ``*bf16``, ``i32``, ``fp32``.
        constants: arguments that are constant, absent tensors (``None``) and strides of 1 among them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target == "interpreter":
        raise ConfigError("target='interpreter' is not compiled; name an architecture such as sm_90")
    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel = getattr(module, name)
    types = {argument: "constexpr" if argument in constants else signature[argument] for argument in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind.startswith("*")
    }
    divisible |= {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in kernel.arg_names
        if types[argument] == "i32" and "stride" in argument
    }
    source = ASTSource(kernel, types, dict(constants), divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=gpu, options=options)


def facts(compiled: Any, trips: int = 1) -> Facts:
    """Read the machine code.

    Args:
        trips: how often the body of the kernel's outermost loop runs.
    """
    if "cubin" in compiled.asm:
        return _nvidia_facts(compiled, trips)
    return _amd_facts(compiled, trips)


# --- NVIDIA --------------------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_BRANCH_TARGET = re.compile(r"`\((\.L_x?_?\d+)\)")


def disassemble(compiled: Any) -> str:
    """SASS of a compiled NVIDIA kernel, or the assembly of an AMD one."""
    if "cubin" not in compiled.asm:
        return compiled.asm["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        result = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    return result.stdout


@functools.cache
def _tool(name: str) -> str:
    import triton

    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia_facts(compiled: Any, trips: int) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    body: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in disassemble(compiled).splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(body)
        elif instruction := _SASS_LINE.search(line):
            body.append((instruction[2], instruction[3]))
    # Code after the last EXIT is the padding that instruction fetch needs.
    end = max(index for index, (name, _) in enumerate(body) if name == "EXIT") + 1
    body = body[:end]
    loops = []
    for index, (name, operands) in enumerate(body):
        target = _BRANCH_TARGET.search(operands)
        if name.startswith("BRA") and target and labels.get(target[1], end) <= index:
            loops.append((labels[target[1]], index))
    weights = _weights(len(body), loops, trips)
    mix: dict[str, int] = {}
    accesses: dict[tuple[str, int], int] = {}
    local = 0
    for (name, _), weight in zip(body, weights, strict=True):
        if name == "NOP":
            continue
        kind = name.split(".")[0]
        mix[kind] = mix.get(kind, 0) + weight
        if kind in ("LDG", "STG"):
            width = next((int(part) // 8 for part in name.split(".") if part in ("64", "128", "256")), 0)
            width = width or next((1 for p in name.split(".") if p in ("U8", "S8")), 0)
            width = width or next((2 for p in name.split(".") if p in ("U16", "S16")), 4)
            access = ("load" if kind == "LDG" else "store", width)
            accesses[access] = accesses.get(access, 0) + weight
        local += weight * (kind in ("LDL", "STL"))
    return Facts(
        registers=used.get("REG", 0),
        spills=used.get("STACK", 0) + used.get("LOCAL", 0),
        local_accesses=local,
        shared_bytes=compiled.metadata.shared,
        accesses=accesses,
        instructions=sum(mix.values()),
        mix=dict(sorted(mix.items(), key=lambda item: -item[1])),
    )


def _weights(size: int, loops: list[tuple[int, int]], trips: int) -> list[int]:
    """How often each instruction runs, from the first and last of each outermost loop."""
    ends: dict[int, int] = {}
    for start, end in loops:
        # A loop may go back from several places.
        ends[start] = max(end, ends.get(start, end))
    weights = [1] * size
    for start, end in ends.items():
        if not any(other < start and end <= ends[other] for other in ends):
            weights[start : end + 1] = [trips] * (end + 1 - start)
    return weights


# --- AMD -----------------------------------------------------------------------------------------------------------

_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:d16_)?(?:hi_)?([a-z]+?)(x[234])?(?:_d16.*)?$")


def _amd_facts(compiled: Any, trips: int) -> Facts:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    body: list[str] = []
    branches: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(body)
        elif line and not line.startswith((".", "//")) and re.match(r"[sv]_|ds_|global_|buffer_|flat_|scratch_", line):
            name = line.split()[0]
            if "branch" in name:
                branches.append((len(body), line.split()[-1]))
            body.append(name)
    loops = [(labels[label], index) for index, label in branches if labels.get(label, len(body)) <= index]
    mix: dict[str, int] = {}
    accesses: dict[tuple[str, int], int] = {}
    local = 0
    for name, weight in zip(body, _weights(len(body), loops, trips), strict=True):
        mix[name] = mix.get(name, 0) + weight
        if access := _AMD_ACCESS.match(name):
            width = _WIDTHS.get(access[2], 4) * int((access[3] or "x1")[1:])
            accesses[access[1], width] = accesses.get((access[1], width), 0) + weight
        local += weight * name.startswith("scratch_")
    return Facts(
        registers=number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not to memory.
        spills=number("vgpr_spill_count") + number("private_segment_fixed_size"),
        local_accesses=local,
        shared_bytes=compiled.metadata.shared,
        accesses=accesses,
        instructions=sum(mix.values()),
        mix=dict(sorted(mix.items(), key=lambda item: -item[1])),
    )


def ssm_update_signature(dtype: str = "bf16", *, state_dtype: str = "float32") -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of an `ssm_update` call as a model makes it: dtype inputs, D and dt_bias, no z, no slots."""
    types = {
        "packed": "*i32",
        "channel_scale": "*bf16",
        "state_scale": "*bf16",
        "rng": "*i64",
        "state": "*fp32" if state_dtype == "float32" else "*bf16",
        **dict.fromkeys(("x", "dt", "B", "C", "y"), f"*{dtype}"),
        **dict.fromkeys(("A", "D", "dt_bias"), "*fp32"),
        **dict.fromkeys(("dt_min", "dt_max"), "fp32"),
    }
    strides = ("x_stride_b", "x_stride_h", "dt_stride_b", "B_stride_b", "B_stride_g", "C_stride_b", "C_stride_g")
    types |= dict.fromkeys(strides, "i32")
    constants: dict[str, Any] = {
        "slots": None,
        "z": None,
        "x_stride_p": 1,
        "dt_stride_h": 1,
        "B_stride_n": 1,
        "C_stride_n": 1,
        "z_stride_b": 1,
        "z_stride_h": 1,
        "z_stride_p": 1,
        "DT_SOFTPLUS": True,
    }
    return types, constants


@functools.cache
def ssm_update_facts(spec: StateSpec, stores: bool | None = None) -> Facts:
    """`Facts` of an `ssm_update` kernel as a model calls it.

    Args:
        stores: for a checkpointed state, the step that stores or one that only reads.
    """
    types, constants = ssm_update_signature(state_dtype=spec.state_dtype)
    kept = "*bf16" if spec.ring_bits == 16 else "*i8"
    types |= {"ring_x": kept, "ring_B": kept, "ring_decay": "*fp32", "ring_position": "*i32", "ring_scale": "*fp32"}
    if spec.flush_interval > 1:
        constants["STORES"] = stores
        types |= {"batches": "i32", "shared": "*fp32"}
        if stores is None:
            constants["shared"] = None
    kernel = compile_kernel(load(spec), "ssm_update", types, constants, spec.target, spec.warps_of(stores))
    return facts(kernel, 1 if spec.prefetched else spec.turns)


@functools.cache
def state_facts(spec: StateSpec) -> Facts:
    """`Facts` of a `quantize_state` kernel for a float32 state, or of a `dequantize_state` kernel."""
    types = {"packed": "*i32", "channel_scale": "*bf16", "state_scale": "*bf16", "rng": "*i64", "state": "*fp32"}
    strides = ("state_stride_b", "state_stride_h", "state_stride_p", "scale_stride_b")
    types |= dict.fromkeys(strides, "i32")
    kernel = compile_kernel(load(spec), spec.kernel, types, {}, spec.target, spec.warps)
    return facts(kernel, spec.turns)
