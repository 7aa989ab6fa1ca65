"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for four GPUs.

The interpreter is chosen when Triton is imported, so its tests (``tests/kernels``) run in a process of their own. It
forgives what the compiler refuses: the launches that the package really makes are compiled here.
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

import pytest
import torch
from torch import Tensor

from verl_troll import kernels

triton = pytest.importorskip("triton", reason="the extra dev brings Triton from Python 3.11 on")

ROOT = Path(__file__).parent.parent
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
# What the host launches; all other functions of these modules are called from kernels.
ENTRIES = {
    "verl_troll.kernels.logits": ("_read", "_write_dense", "_write_corrected"),
    "verl_troll.kernels.projection": ("_project", "_project_gradient"),
}


# --- run by the interpreter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logits", "projection", "engines"])
def test_in_the_interpreter(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/interpreted_{name}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


# --- compiled ahead of time -------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A launch that did not happen: the kernel, and the arguments it was given."""

    kernel: Any
    arguments: dict[str, Any]

    def compile(self, target: str) -> Any:
        """As Triton would at this launch: it specialises on integers of 1, and on what 16 divides."""
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
            else:
                assert type(value) is int, f"{parameter.name} would be rounded to float32"
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible:
                attributes[(place,)] = [["tt.divisibility", 16]]
        options = {key: value for key, value in self.arguments.items() if key not in self.kernel.arg_names}
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=triton.backends.compiler.GPUTarget(*TARGETS[target]), options=options)


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, made: list[Launch]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        # Only the first dimension of a grid may be large.
        assert all(x > 0 for x in grid) and all(x < 2**16 for x in grid[1:])
        return self.record

    def record(self, *positional: Any, **named: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
        self.made.append(Launch(self.kernel, arguments))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Launch]:
    """The launches that the package makes from here on. Nothing runs, and nothing compiled before is reused."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[Launch] = []
    for module_name, names in ENTRIES.items():
        module = importlib.import_module(module_name)
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), made))
    return made


def read(dtype: torch.dtype, *, columns: int = 151936, k: int = 0, energy: bool = False) -> None:
    logits, rows = torch.empty(3, columns, dtype=dtype), torch.arange(2)
    kernels.read_rows(logits, rows, columns, k=k, energy=energy)


def write(dtype: torch.dtype, *, columns: int = 151936, width: int = 65, slope: bool = False) -> None:
    logits, rows, ids = torch.empty(3, columns, dtype=dtype), torch.arange(2), torch.zeros(2, width, dtype=torch.int64)
    peak = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32))
    kernels.write_gradient(logits, logits, rows, columns, peak, peak, peak if slope else None, ids, ids.to(peak.dtype))


def project(dtype: torch.dtype, *, n: int = 66, implicit: bool = True) -> None:
    new, old = torch.zeros(2, n, dtype=dtype, requires_grad=True), torch.zeros(2, n, dtype=dtype)
    kernels.project(new, old, 0.05, 1e-3, implicit)[0].sum().backward()  # type: ignore[no-untyped-call]


@by_target
def test_what_a_training_step_launches_compiles(target: str, launches: list[Launch]) -> None:
    read(torch.bfloat16, k=64)
    read(torch.bfloat16, energy=True)
    read(torch.bfloat16)
    write(torch.bfloat16)
    write(torch.bfloat16, slope=True)
    project(torch.float32)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        *3 * ["_read"],
        *2 * ["_write_dense", "_write_corrected"],
        "_project",
        "_project_gradient",
    ]
    compiled = [launch.compile(target) for launch in launches]
    # The old and the new pass must get the same bits from the same logits: their sums are over the same threads.
    assert len({layout for reading in compiled[:3] for layout in layouts_of_sums(reading.asm["ttgir"])}) == 1
    if "ptx" in compiled[3].asm:
        # To the nearest bfloat16; the interpreter cannot show it.
        for writing in compiled[3:7]:
            assert set(re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", writing.asm["ptx"])) == {"rn"}


def layouts_of_sums(intermediate: str) -> list[str]:
    """Definitions of the layouts in which float32 vectors are reduced to numbers."""
    names = re.findall(r"\(tensor<\d+xf32, (#\w+)>\) -> f32", intermediate)
    assert names
    return [re.findall(rf"^{name} = (.*)$", intermediate, flags=re.MULTILINE)[0] for name in names]


@pytest.mark.slow
@by_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_variant_compiles(target: str, dtype: torch.dtype, launches: list[Launch]) -> None:
    # Columns of 1, and numbers of columns that nothing divides, are compiled on their own.
    for columns in (1, 50257, 151936):
        read(dtype, columns=columns, energy=True)
        write(dtype, columns=columns, slope=True)
        write(dtype, columns=columns, width=1)
    # The search for the largest compiles longest.
    for k in {torch.bfloat16: (1, 256, 1024), torch.float32: (64,), torch.float16: (64,)}.get(dtype, ()):
        read(dtype, k=k, energy=True)
    if dtype == torch.bfloat16:
        read(dtype, columns=50257, k=64)
    if dtype in (torch.float32, torch.float64):
        for n in (1, 66, 130, 600):
            project(dtype, n=n)
            project(dtype, n=n, implicit=False)
    for launch in launches:
        launch.compile(target)


@pytest.mark.parametrize(
    ("version", "hip", "serves"),
    [("3.3.1", None, False), ("3.4.0", None, True), ("3.7.0+rocm7", "7.0", False), ("3.8.0", "7.0", True)],
)
def test_which_triton_serves(monkeypatch: pytest.MonkeyPatch, version: str, hip: str | None, serves: bool) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    kernels._triton_serves.cache_clear()
    try:
        assert kernels.available(torch.device("cuda")) == serves
        assert not kernels.available(torch.device("cpu"))
    finally:
        kernels._triton_serves.cache_clear()


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, verl_troll.logits, verl_troll.projection\n"
        "from verl_troll import kernels\n"
        "assert not any(name.startswith('verl_troll.kernels.') for name in sys.modules)\n"
        "assert not kernels.available(torch.device('cuda'))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
