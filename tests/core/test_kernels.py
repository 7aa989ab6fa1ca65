"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled ahead of time for four GPUs.

Triton chooses the interpreter at import, so its tests (``tests/core/kernels``) run in their own process. It accepts
code that the compiler refuses, so the package's real launches are compiled here.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.processes import run
from verl_troll.core import kernels
from verl_troll.core.loss import policy_terms
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits

triton = pytest.importorskip("triton", reason="the extra dev brings Triton from Python 3.11 on")

ROOT = Path(__file__).parents[2]
TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
# Backend, architecture and threads per warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
by_target = pytest.mark.parametrize("target", TARGETS)
# Launched by the host; kernels call all other functions of these modules.
ENTRIES = {
    "verl_troll.core.kernels.logits_triton": ("_read", "_search", "_write"),
    "verl_troll.core.kernels.tokens_triton": ("_keep", "_terms", "_combine"),
    "verl_troll.core.kernels.projection_triton": ("_project", "_project_gradient"),
}
OLD_PASS = ["_read", "_search", "_keep"]
UPDATES = {
    "anchored": ["_read", "_terms", "_combine", "_write"],
    "union": ["_read", "_search", "_keep", "_terms", "_combine", "_write"],
}
# Maximum registers, and instructions per logit in the streaming loops on sm_90, in bfloat16 with 16 columns per thread
# and tile for writing and 32 for reading. Above either limit, the memory waits.
READ_INSTRUCTIONS = {"anchored": 13, "union": 14}
WRITE_INSTRUCTIONS = {False: 10.5, True: 12.5}
REGISTERS = {"_read": 64, "_search": 96, "_write": 48, "_keep": 64, "_terms": 176, "_combine": 64}


# --- run by the interpreter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", "projection", "rough", "tokens", "counts", "engines"])
def test_in_the_interpreter(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/core/kernels/interpreted_{name}.py",
    ]
    done = run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A recorded launch that did not run: the kernel and its arguments."""

    kernel: Any
    arguments: dict[str, Any]

    def compile(self, target: str) -> Any:
        """As Triton would at this launch: it specialises on integers equal to 1 or divisible by 16."""
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
                continue
            if isinstance(value, Tensor):
                signature[parameter.name] = "*" + TRITON_NAMES[value.dtype]
                divisible = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                # Triton rounds it to float32; nothing else may depend on that.
                assert parameter.name == "mass_to_keep"
                signature[parameter.name] = "fp32"
                continue
            else:
                assert type(value) is int
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible:
                attributes[(place,)] = [["tt.divisibility", 16]]
        options = {key: value for key, value in self.arguments.items() if key not in self.kernel.arg_names}
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=triton.backends.compiler.GPUTarget(*TARGETS[target]), options=options)


class Recorder:
    """Stands in for a kernel and records its launches."""

    def __init__(self, kernel: Any, made: list[Launch]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        # Only a grid's first dimension may be large.
        assert all(x > 0 for x in grid) and all(x < 2**16 for x in grid[1:])
        return self.record

    def record(self, *positional: Any, **named: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
        self.made.append(Launch(self.kernel, arguments))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Launch]:
    """Launches that the package makes from here on. Nothing runs, and no earlier compilation is reused."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[Launch] = []
    for module_name, names in ENTRIES.items():
        module = importlib.import_module(module_name)
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), made))
    return made


def step(
    rule: str, dtype: torch.dtype = torch.bfloat16, *, columns: int = 151936, k: int = 64, entropy: bool = False
) -> None:
    """An old pass and an update with its backward pass, on tensors that no kernel fills."""
    logits, rows = torch.empty(3, columns, dtype=dtype), torch.arange(2)
    with mock.patch.object(kernels, "available", return_value=True):
        select(VocabLogits.of(logits, rows), rows, Selection(k, 1e-5), entropy=True)
        old = SparsePolicy(torch.zeros(2, k + 1, dtype=torch.int64), torch.zeros(2, k + 1), rows)
        leaf = logits.requires_grad_()
        terms = policy_terms(rule, VocabLogits.of(leaf, rows), old, Selection(k, 1e-5), kl_bound=0.05, entropy=entropy)
        loss = (terms.log_ratio + terms.regression_kl).sum()
        torch.autograd.backward(loss if terms.entropy is None else loss + terms.entropy.sum())


def project(dtype: torch.dtype, *, n: int = 66, implicit: bool = True) -> None:
    new, old = torch.zeros(2, n, dtype=dtype, requires_grad=True), torch.zeros(2, n, dtype=dtype)
    with mock.patch.object(kernels, "available", return_value=True):
        kernels.project(new, old, 0.05, 1e-3, implicit)[0].sum().backward()


@pytest.mark.parametrize(("target", "rule"), [*((target, "union") for target in TARGETS), ("sm_90", "anchored")])
def test_what_a_training_step_launches_compiles(target: str, rule: str, launches: list[Launch]) -> None:
    step(rule)
    project(torch.float32)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == [*OLD_PASS, *UPDATES[rule], "_project", "_project_gradient"]
    compiled = [launch.compile(target) for launch in launches]
    # Old and new pass must get the same bits from the same logits, so both must sum over the same threads.
    old, new = (
        layouts_of_sums(code.asm["ttgir"], launch.arguments["LANES"], launch.arguments["WIDE"])
        for launch, code in zip(launches, compiled, strict=True)
        if launch.kernel.fn.__name__ == "_read"
    )
    assert old == new
    (writing,) = [x for name, x in zip(names, compiled, strict=True) if name == "_write"]
    if "ptx" in writing.asm:
        # Rounds to the nearest bfloat16, which the interpreter cannot show.
        assert set(re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", writing.asm["ptx"])) == {"rn"}


@pytest.mark.parametrize("rule", UPDATES)
@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
def test_what_a_step_costs_on_sm_90(rule: str, entropy: bool, launches: list[Launch], tmp_path: Path) -> None:
    step(rule, entropy=entropy)
    machine_code = [(launch, MachineCode(launch.compile("sm_90"), tmp_path)) for launch in launches]
    # Few variants, so that little is compiled at the start of a run.
    assert len({(launch.kernel.fn.__name__, code.text) for launch, code in machine_code}) <= 7
    for launch, code in machine_code:
        name = launch.kernel.fn.__name__
        assert code.registers <= REGISTERS[name], name
        # The search spills some registers, on purpose.
        assert code.stack_bytes <= (300 if name == "_search" else 0), name
        per_thread = 32 * launch.arguments["num_warps"]
        if name == "_read":
            held = launch.arguments["LANES"] * launch.arguments["WIDE"] / per_thread
            assert max(code.loops) / held <= READ_INSTRUCTIONS["union" if launch.arguments["TOP"] else "anchored"]
        if name == "_write":
            assert max(code.loops) * per_thread / launch.arguments["BLOCK"] <= WRITE_INSTRUCTIONS[entropy]


class MachineCode:
    """A compiled kernel on an NVIDIA GPU.

    Attributes:
        registers, stack_bytes: per thread.
        loops: instructions of each loop.
    """

    def __init__(self, compiled: Any, folder: Path) -> None:
        file = folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", self._dump("-res-usage", file))
        assert usage is not None
        self.registers, self.stack_bytes = (int(x) for x in usage.groups())
        self.text = self._dump("-sass", file)
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", self.text)
        place = {int(address, 16): i for i, (address, _) in enumerate(found)}
        jumps = [(i, re.search(r"\bBRA\b.* (?:`\(\S+\)|0x([0-9a-f]+))", text)) for i, (_, text) in enumerate(found)]
        targets = [(i, place[int(jump.group(1), 16)]) for i, jump in jumps if jump is not None and jump.group(1)]
        self.loops = [i - target + 1 for i, target in targets if target < i]

    @staticmethod
    def _dump(what: str, file: Path) -> str:
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.run(
            [tools / "cuobjdump", what, file], env=environment, capture_output=True, text=True, check=True
        ).stdout


def layouts_of_sums(intermediate: str, lanes: int, wide: int) -> set[str]:
    """Thread layouts of the tile and of the lanes in their reductions."""
    found = set()
    for shape, layout in re.findall(r"\}\) : \(tensor<([\dx]+)xf32, ([^)]*)>\) -> ", intermediate):
        if shape in (f"{lanes}x{wide}", f"{lanes}"):
            (name,) = re.findall(r"#\w+$|(?<=parent = )#\w+", layout)
            (definition,) = re.findall(rf"^{name} = (.*)$", intermediate, flags=re.MULTILINE)
            found.add(f"{shape} {layout.replace(name, definition)}")
    assert len(found) >= 2, found
    return found


@pytest.mark.slow
@by_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_variant_compiles(target: str, dtype: torch.dtype, launches: list[Launch]) -> None:
    # Triton compiles a column count of 1, or one not divisible by 16, separately.
    for columns in (1, 50257, 151936):
        for rule in UPDATES:
            step(rule, dtype, columns=columns, entropy=True)
    for k in (1, 256, kernels.MAX_K_OF_TERMS) if dtype == torch.bfloat16 else ():
        step("union", dtype, k=k)
        step("anchored", dtype, k=k)
    for number in (torch.float32, torch.float64) if dtype == torch.float32 else ():
        for n in (1, 66, 130, 600):
            project(number, n=n)
            project(number, n=n, implicit=False)
    for launch in launches:
        launch.compile(target)


@pytest.mark.parametrize(
    ("version", "hip", "serves"),
    [("3.3.1", None, False), ("3.4.0", None, True), ("3.7.0+rocm7", "7.0", False), ("3.8.0", "7.0", True)],
)
def test_which_triton_is_recent(monkeypatch: pytest.MonkeyPatch, version: str, hip: str | None, serves: bool) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    kernels._triton_is_recent.cache_clear()
    try:
        assert kernels.available(torch.device("cuda")) == serves
        assert not kernels.available(torch.device("cpu"))
    finally:
        kernels._triton_is_recent.cache_clear()


@pytest.mark.parametrize(
    ("version", "choice", "k", "reason"),
    [
        ("3.6.0", "auto", 64, None),
        ("3.6.0", "auto", 511, None),
        ("3.6.0", "auto", 512, "they hold at most 511 ids"),
        ("3.6.0", "torch", 64, "kernels=torch was chosen"),
        ("3.3.1", "auto", 64, r"Triton 3\.4 or later is not installed"),
    ],
)
def test_what_hinders_the_kernels_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str, choice: str, k: int, reason: str | None
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", None)
    kernels._triton_is_recent.cache_clear()
    try:
        found = kernels.why_torch(torch.device("cuda"), k, choice)
        assert kernels.why_torch(torch.device("cpu"), k, choice) is None
    finally:
        kernels._triton_is_recent.cache_clear()
    assert found is None if reason is None else re.search(reason, found or "")


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, verl_troll.core.logits, verl_troll.core.projection\n"
        "from verl_troll.core import kernels\n"
        "assert not any(name.endswith('_triton') for name in sys.modules)\n"
        "assert not kernels.available(torch.device('cuda'))\n"
    )
    run([sys.executable, "-c", code], cwd=ROOT, check=True)
