"""Who may import whom; what must not be imported at all; what tests may not reach into."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "turboesm_cli"
DATA = ROOT / "data"

FLOORS = (
    "turboesm",
    "app",
    "commands",
    "evaluation",
    "engine",
    "cache",
    "codec",
    "statistics",
    "models",
    "sequences",
    "reporting",
    "outputs",
    "console",
    "streams threads whereabouts",
    "errors",
    "__init__",
)
"""Folders and modules of turboesm_cli from the top down, each importing from those below it and from itself; what
shares a line imports nothing of each other. Imports inside functions and for type checkers count, too."""
WITHOUT_TORCH = {
    "app",
    "cache.formats",
    "cache.cache_file",
    "codec.header",
    "codec.recipes",
    "codec.sizes",
    "commands.planning",
    "console",
    "engine.memory_plan",
    "engine.workload",
    "errors",
    "models.families",
    "models.folders",
    "models.names",
    "models.random_shapes",
    "outputs.archive",
    "outputs.files",
    "outputs.identity",
    "outputs.joining",
    "outputs.journal",
    "outputs.locks",
    "outputs.shard_records",
    "outputs.shards",
    "reporting.json_list",
    "reporting.markdown",
    "reporting.pages",
    "reporting.plots",
    "reporting.results",
    "reporting.sections",
    "reporting.sources",
    "reporting.tables",
    "sequences.fasta",
    "streams",
    "threads",
    "whereabouts",
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


CODE = sorted(CLI.rglob("*.py"))


def module_of(path: Path) -> str:
    """`cache.packed` of turboesm_cli/cache/packed.py."""
    return ".".join(path.relative_to(CLI).with_suffix("").parts)


def own_imports(path: Path) -> set[str]:
    """Modules of turboesm_cli that a file of it imports, as `module_of` names them."""
    known = {module_of(other) for other in CODE}
    names = {name.removeprefix("turboesm_cli.") for name in imports(path) if name.startswith("turboesm_cli.")}
    return {name for name in names if name in known}


def floor_of(module: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if module.split(".")[0] in names.split())


@pytest.mark.parametrize("path", CODE, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    here = module_of(path)
    assert any(here.split(".")[0] in names.split() for names in FLOORS), f"name the floor of {here} in FLOORS"
    for name in own_imports(path):
        assert floor_of(name) > floor_of(here) or name.split(".")[0] == here.split(".")[0], (
            f"{here} imports {name}"
        )


FAMILIES_OWN = (
    "models.esm",
    "models.fair_esm",
    "models.decoder",
    "models.random_decoders",
    "models.hugging_face",
    "models.checkpoints",
    "models.weights",
)


@pytest.mark.parametrize("path", CODE, ids=module_of)
def test_models_are_known_by_their_protocol(path: Path) -> None:
    here = module_of(path)
    if not here.startswith("models.") and here != "commands.options":  # which names the model of the demo
        assert not [name for name in own_imports(path) if name.startswith(FAMILIES_OWN)]


def test_nothing_imports_in_a_circle() -> None:
    graphlib.TopologicalSorter({module_of(path): own_imports(path) for path in CODE}).prepare()  # or CycleError


def test_the_house_is_no_tower() -> None:
    """By what the code imports, and not by the list: the longest chain of folders that import each other."""
    graph: dict[str, set[str]] = {}
    for path in CODE:
        here = module_of(path).split(".")[0]
        graph.setdefault(here, set()).update({name.split(".")[0] for name in own_imports(path)} - {here})
    height: dict[str, int] = {}
    for folder in graphlib.TopologicalSorter(graph).static_order():
        height[folder] = 1 + max((height[below] for below in graph.get(folder, ())), default=0)
    assert max(height.values()) <= 12, height


KERNEL_FILES = list((ROOT / "kernels" / "turboesm_kernels").glob("*.py"))
KERNELS = [
    {"__init__", "arguments", "available", "compiling", "layout"},
    {"reference", "ptx_text"},
    {"grouped_text"},
    {"bits", "token_tables"},
    {"cpu_masks"},
    {"prepared"},
    {"operands"},
    {"cpu_lookup", "cpu_loops", "launch", "parts", "triton_kernels"},
    {"token_kernels", "triton_launch", "ptx_kernels", "cpu_compiled"},
    {"rotary", "linear", "add_norm", "gated", "sampling"},
    {"pack", "token_layer", "grouped_kernels"},
    {"step_kernels", "grouped_launch"},
    {"ptx_launch"},
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


def test_one_module_imports_transformers() -> None:
    for path in [*CODE, *KERNEL_FILES]:
        asked = re.search(r"^\s*(from|import) transformers\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert (asked is not None) == (path == CLI / "turboesm" / "hf.py"), path.name


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


HELP = """
import contextlib, io, json, sys, typer.main
from turboesm_cli.app import app, main
loaded = {}
for command in ["", *typer.main.get_command(app).commands]:
    sys.argv = ["turboesm", *command.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main()
    assert "--help" in printed.getvalue(), command
    loaded[command] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""
SLOW_TO_IMPORT = {"torch", "esm", "numpy", "pandas", "matplotlib", "safetensors", "triton", "transformers"}


def test_help_imports_nothing_slow() -> None:
    """Of turboesm and of each command: so it answers at once."""
    loaded = json.loads(run_python(HELP))
    assert {"", "calibrate", "quantize", "decode", "bench", "report"} <= set(loaded)
    for command, modules in loaded.items():
        assert not SLOW_TO_IMPORT & set(modules), command


PLAN = """
import contextlib, io, sys
from turboesm_cli.app import main
sys.argv = ["turboesm", {arguments}]
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    main()
assert "largest batch" in printed.getvalue()
print("torch" in sys.modules, "numpy" in sys.modules)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "tests/golden/auto-v1.tqz", "data/evaluation/peptide.fasta"),
        ("bench", "throughput", "--model", "random:esm2_t33_650M"),
        ("bench", "throughput", "--bundle", "tests/golden/auto-v1.tqz", "--context", "64"),
    ],
    ids=["decode", "bench of a name", "bench of a bundle"],
)
def test_a_plan_imports_nothing_slow(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it answers in less than a second."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TURBOESM_MODEL", raising=False)
    given = ", ".join(map(repr, (*arguments, "--plan", "--memory", "24GiB")))
    assert run_python(PLAN.format(arguments=given)) == "False False"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_tests_use_what_is_public(path: Path) -> None:
    """No private name of another file is imported, asked for or replaced: it may go without notice."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    own = {"self", "cls", *(node.name for node in nodes if isinstance(node, ast.ClassDef))}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not any(is_private(alias.name) for alias in node.names), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in own):
            assert not is_private(node.attr), f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            texts = [str(arg.value) for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            assert not any(is_private(name) for text in texts for name in text.split(".")), f"line {node.lineno}"


EVERY_NAME = """
import sys, turboesm
for name in turboesm.__all__:
    getattr(turboesm, name)
for name, module in list(sys.modules.items()):
    if name.startswith("turboesm"):
        print(module.__file__)
"""
"""Files that all of `import turboesm` comes from: those beside an editable install are not the wheel's."""


@pytest.mark.slow
def test_the_wheel_holds_what_it_should(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    homes = {"turboesm": CLI / "turboesm", "turboesm_kernels": ROOT / "kernels" / "turboesm_kernels"}
    code = {f"{name}/{path.relative_to(home)}" for name, home in homes.items() for path in home.rglob("*.py")}
    code |= {f"turboesm_cli/{path.relative_to(CLI)}" for path in CODE if path.parent.name != "turboesm"}
    code |= {"turboesm/py.typed", "turboesm_cli/py.typed", "turboesm_data/__init__.py"}
    code |= {"turboesm_cli/reporting/page.css", "turboesm_cli/reporting/page.js"}
    data = {f"turboesm_data/{path.relative_to(DATA)}" for path in DATA.glob("*/*.fasta")}
    data |= {"turboesm_data/README.md", "turboesm_data/SOURCES.tsv"}
    data |= {f"turboesm_cli/guides/{path.name}" for path in (CLI / "guides").glob("*.md")}
    data |= {f"turboesm_cli/slurm/{path.name}" for path in (CLI / "slurm").iterdir()}
    described = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - described == code | data
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_NAME], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert done.stdout and all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines()), done
