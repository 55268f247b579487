"""Who may import whom; what must not be imported at all; how fast help answers."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "turboesm_cli"
DATA = ROOT / "data"

# Each module may import those before it, its own line included, and the leaves.
LEAVES = {"__init__", "errors", "files", "metrics", "running", "timing", "console", "datasets", "identity"}
LEAVES |= {"streams", "threads"}
STAGES = [
    {"inputs", "journal", "json_list", "lookalikes", "rejects", "seen", "tokens"},
    {"sources"},
    {"lines"},
    {"records"},
    {"archive", "quantizer", "results", "sequences", "work"},
    {"formats", "lengths", "outcomes", "prompts", "variants"},
    {"fair_esm", "shapes", "tables", "plots"},
    {"weights"},
    {"esm_config"},
    {"hugging_face"},
    {"checkpoints"},
    {"model"},
    {"decode", "dense", "figures", "pages"},
    {"batching", "generation", "recipes"},
    {"sensitivity", "axes", "allocation"},
    {"sums"},
    {"stats"},
    {"moments"},
    {"sides"},
    {"codec"},
    {"cache"},
    {"bundle", "memory"},
    {"calibration", "packfile"},
    {"engine", "inventory"},
    {"plan", "tasks"},
    {"evaluation", "replay"},
    {"prefill", "summaries", "workload"},
    {"ablation", "benchmark", "throughput"},
    {"crossover"},
    {"paper_kernel", "synthetic"},
    {"bench_kernels"},
]
WITHOUT_TORCH = {
    "errors",
    "files",
    "console",
    "identity",
    "journal",
    "json_list",
    "sequences",
    "results",
    "figures",
    "pages",
    "tables",
    "plots",
    "app",
}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports anywhere, as turboesm_cli.NAME or turboesm_kernels."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.startswith(("turboesm_cli", "turboesm_kernels", "kernels"))}
    return found


def stage_modules(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("turboesm_cli.")}
    return {name for name in names if (CLI / f"{name}.py").exists()}


def rank(module: str) -> int:
    return next((index for index, stage in enumerate(STAGES) if module in stage), -1)


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_stages_import_leftward_only(path: Path) -> None:
    if path.stem in {"app", "__init__"}:
        return
    assert path.stem in LEAVES or rank(path.stem) >= 0, f"name the stage of {path.stem} in STAGES"
    for name in stage_modules(path):
        assert name in LEAVES or (path.stem not in LEAVES and rank(name) <= rank(path.stem)), (
            f"{path.stem} imports {name}"
        )


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_no_stage_imports_commands(path: Path) -> None:
    if path.stem != "app":
        assert not any(name.startswith(("turboesm_cli.commands", "turboesm_cli.app")) for name in imports(path))


KERNEL_FILES = list((ROOT / "kernels" / "turboesm_kernels").glob("*.py"))
KERNELS = [
    {"__init__", "available", "layout"},
    {"reference", "ptx_text"},
    {"bits", "token_tables"},
    {"prepared"},
    {"operands"},
    {"cpu_lookup", "launch", "triton_kernels"},
    {"token_kernels", "triton_launch", "ptx_kernels", "rotary"},
    {"ptx_launch", "pack", "token_layer"},
    {"dispatch"},
    {"verify"},
]
"""The kernels' modules: each may import those of earlier lines, inside functions and for type checkers, too."""


@pytest.mark.parametrize("path", sorted(KERNEL_FILES), ids=lambda path: path.stem)
def test_kernels_import_what_is_below_them(path: Path) -> None:
    floor = {name: number for number, names in enumerate(KERNELS) for name in names}
    assert path.stem in floor, f"name the floor of {path.stem} in KERNELS"
    for name in imports(path):
        _, _, module = name.partition("turboesm_kernels.")
        if (module := module.split(".")[0]) in floor:
            assert floor[module] < floor[path.stem], f"{path.stem} imports {module}"


def test_kernels_know_nothing_of_the_command_line() -> None:
    for path in KERNEL_FILES:
        assert not any(name.startswith("turboesm_cli") for name in imports(path)), path.name


def test_only_the_console_prints() -> None:
    for path in CLI.rglob("*.py"):
        if path.stem != "console":
            calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), (
                path.name
            )


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_import_without_torch(module: str) -> None:
    code = f"import sys, turboesm_cli.{module}; print('torch' in sys.modules, 'esm' in sys.modules)"
    assert run_python(code) == "False False"


def test_there_is_no_package_called_kernels() -> None:
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert run_python(f"import sys; sys.path[:1] = []; {code}") == "None"


def test_help_answers_at_once() -> None:
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "turboesm_cli.app", "--help"], capture_output=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert best < 1.5  # torch alone takes longer to import; typically 0.25 s


@pytest.mark.slow
def test_the_wheel_holds_what_it_should(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    homes = {"turboesm_cli": CLI, "turboesm_kernels": ROOT / "kernels" / "turboesm_kernels", "turboesm_data": DATA}
    code = {f"{name}/{path.relative_to(home)}" for name, home in homes.items() for path in home.rglob("*.py")}
    data = {f"turboesm_data/{path.relative_to(DATA)}" for path in DATA.glob("*/*.fasta")}
    data |= {"turboesm_data/README.md", "turboesm_data/SOURCES.tsv"}
    described = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - described == code | data
