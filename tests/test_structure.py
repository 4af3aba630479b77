"""The shape of the code: who may import whom, where devices are named, what loads when."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hstu_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ROOT_MODULES = {"config", "errors", "hardware", "timing"}
"""Modules that anything may use and that use nothing but one another."""

MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"commands"},
    "commands": {"charts", "training", "bench", "model", "kvcache", "kernels", "backend", "data", "report"},
    "training": {"bench", "model", "kernels", "backend", "data"},
    "bench": {"model", "kvcache", "kernels", "backend", "data", "report"},
    "model": {"kvcache", "kernels", "backend"},
    "kvcache": {"kernels", "backend"},
    "kernels": {"backend"},
    "backend": set(),
    "data": set(),
    "report": set(),
    "charts": {"report"},
    "config": set(),
    "errors": set(),
    "hardware": set(),
    "timing": set(),
    "__init__": set(),
}


def part_of(path: Path) -> str:
    """The folder or root module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, inside functions too."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("hstu_cli.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path)
    assert imported_parts(path) <= MAY_IMPORT[part] | ROOT_MODULES | {part}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_do(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "the first line says what the file does"
    assert len(text.splitlines()) <= 400


def test_only_backend_names_devices() -> None:
    named = {
        part_of(path)
        for path in SOURCES
        if re.search(r"torch\.(cuda|npu)\b|\.cuda\(|\.npu\(", path.read_text(encoding="utf-8"))
    }
    assert named == {"backend"}


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; return its stdout."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_no_heavy_package() -> None:
    loaded = run_python(
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hstu_cli.cli import app\n"
        "commands = [], ['infer'], ['train'], ['bench-layer'], ['bench-e2e'], ['compare'], ['preprocess', 'kuairand']\n"
        "for arguments in (*([*command, '--help'] for command in commands), ['--version']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0, result.output\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ).split()
    assert not set(loaded) & {"torch", "triton", "numpy", "pyarrow", "duckdb", "requests"}


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
from hstu_cli.cli import app
sys.argv = ['hstu', *{arguments}]
app()
"""


def test_inference_needs_no_accelerator_package(tmp_path: Path) -> None:
    blocked = {"triton", "torch_npu", "flashinfer", "torchrec", "fbgemm_gpu", "dynamicemb"}
    arguments = ["infer", "--config", "tiny", "--steps", "2", "--format", "json"]
    out = run_python(BLOCK.format(blocked=blocked, arguments=arguments), HSTU_HOME=str(tmp_path))
    assert '"status": "valid"' in out


def test_env_needs_no_data_package(tmp_path: Path) -> None:
    blocked = {"pyarrow", "duckdb", "requests", "torchmetrics", "polars", "filelock"}
    out = run_python(BLOCK.format(blocked=blocked, arguments=["env", "--format", "json"]))
    assert '"command": "env"' in out


@pytest.mark.parametrize("command", ["bench-layer", "bench-e2e"])
def test_benchmarks_need_torch_numpy_typer_and_rich_alone(command: str) -> None:
    blocked = {"pyarrow", "duckdb", "requests", "torchmetrics", "polars", "filelock", "safetensors", "matplotlib"}
    small = {
        "bench-layer": ["--history", "8", "--candidates", "0", "--batch-size", "1"],
        "bench-e2e": ["--history-step", "4", "--num-batches", "2", "--candidates", "3", "--num-users", "1"],
    }
    arguments = [command, "--config", "tiny", *small[command], "--num-iters", "1", "--format", "json"]
    out = run_python(BLOCK.format(blocked=blocked, arguments=arguments))
    assert '"status": "valid"' in out


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("bench-e2e", ["(1,2,4,8)", "(32, or"]),
        ("bench-layer", ["(32, or"]),
        ("train", ["(--until)", "(--from)", "(all, or"]),
    ],
)
def test_help_shows_defaults_that_are_worked_out(command: str, defaults: list[str]) -> None:
    shown = run_python(
        "from typer.testing import CliRunner\n"
        "from hstu_cli.cli import app\n"
        f"print(CliRunner().invoke(app, ['{command}', '--help']).output)"
    )
    assert all(default in shown for default in defaults), shown
