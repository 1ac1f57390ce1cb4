"""The rules of the tree: rooms without __init__.py, who may import whom, the driver's size, shipped configs, no path of any machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "models", "rollout", "rewards", "distill", "rl")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "rollout": {"kernels", "models", "rollout"},
    "rewards": {"kernels", "models", "rollout", "rewards"},
    "distill": {"kernels", "models", "rollout", "distill"},
    "rl": set(ROOMS),
}
# `python rl/x.py` puts rl/ first on sys.path: a file of these names would then be the standard library's
SHADOWS = {"types", "logging", "math", "random", "queue", "select", "code", "token", "profile", "copy"}
INSIDE_ONLY = {"ray", "vllm"}  # seconds to import, and only some processes need them
VLLMS_OWN = {
    "rollout/vllm_backend.py",
    "rollout/vllm_model.py",
}  # classes of vLLM's kind: it opens these files, nobody else does
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of imported modules with their lines, anywhere in the tree. `from winnow.rl import x` counts as winnow.rl.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported when the file is: everything outside functions and outside `if TYPE_CHECKING:`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, _ in imported(ast.Module([node], [])))
        else:
            waiting.extend(ast.iter_child_nodes(node))


def test_no_room_has_an_init_file() -> None:
    """transformers looks for a package called `kernels` on sys.path, and Ray puts the driver's folder there in every worker. A regular
    package of ours by that name would win over Hugging Face's and break every model class once theirs is installed; a folder without
    __init__.py loses to theirs, and ours is still winnow.kernels."""
    found = [
        str(path.relative_to(ROOT))
        for room in (*ROOMS, "configs", "tests")
        for path in (ROOT / room).rglob("__init__.py")
    ]
    assert not found, f"{found}: delete them (this test's docstring says why)"


def test_the_package_list_equals_the_tree() -> None:
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and (any(path.glob("*.py")) or path.name == "configs")
    }
    expected = {f"winnow.{name}": name for name in folders - {"tests"}}
    setup = PYPROJECT["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted(expected), "pyproject.toml's packages and the folders differ"
    assert setup["package-dir"] == expected
    nested = [str(file.relative_to(ROOT)) for file in sources() if file.parent.parent != ROOT]
    assert not nested, f"{nested}: packages are listed one by one, so folders stay flat"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_is_below_them(room: str) -> None:
    wrong = []
    for file in sorted((ROOT / room).glob("*.py")):
        for name, line in imported(ast.parse(file.read_text())):
            parts = name.split(".")
            if parts[0] == "winnow" and len(parts) > 1 and parts[1] not in MAY_IMPORT[room] | {"configs"}:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, f"{room} may import {sorted(MAY_IMPORT[room])}:\n" + "\n".join(wrong)


def test_nobody_imports_a_bare_folder_name() -> None:
    wrong = []
    for file in [*sources(), *sorted((ROOT / "tests").glob("*.py"))]:
        for name, line in imported(ast.parse(file.read_text())):
            if name.split(".")[0] in (*ROOMS, "configs", "tests"):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}, want winnow.{name}")
    assert not wrong, "\n".join(wrong)


def test_ray_and_vllm_are_never_imported_with_a_file() -> None:
    names = {f"winnow.{file[:-3].replace('/', '.')}" for file in VLLMS_OWN}
    wrong = [
        f"{path} imports {name}"
        for file in sources()
        for path in [str(file.relative_to(ROOT))]
        for name in top_level_imports(ast.parse(file.read_text()))
        if (name.split(".")[0] in INSIDE_ONLY or name.rpartition(".")[0] in names) and path not in VLLMS_OWN
    ]
    assert not wrong, "import these inside the function that needs them:\n" + "\n".join(wrong)


def test_no_file_shadows_the_standard_library() -> None:
    wrong = [str(file.relative_to(ROOT)) for file in sources() if file.stem in SHADOWS]
    assert not wrong


def test_the_driver_stays_an_algorithm_one_can_read() -> None:
    lines = (ROOT / "rl" / "train.py").read_text().count("\n")
    assert lines <= 100, f"rl/train.py has {lines} lines; what is not the algorithm belongs below it"


def test_every_shipped_config_is_checked_by_the_code_that_reads_it() -> None:
    from winnow.rl.config import make_config, read_values, typed
    from winnow.rl.convert_options import ConvertOptions
    from winnow.rl.pipeline_config import make_pipeline
    from winnow.rl.verbs import convert_section, shipped_configs

    shipped = shipped_configs()
    assert {"demo", "smollm2"} <= set(shipped)
    assert set(shipped.values()) == {path for path in shipped.values() if path.is_file()}
    assert sorted(shipped) == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
    for file in shipped.values():
        values = read_values(file)
        if "run" in values:
            make_pipeline(values)
        elif "convert" in values:
            typed(ConvertOptions, convert_section(str(file)))
        else:
            make_config(values, ["model.path=somewhere"])


def test_configs_say_what_they_are_for() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        assert file.read_text().startswith("# "), f"{file.name} needs a first line that says what it is for"
        assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_no_path_of_a_machine_is_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|opt)/\w+")
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and file.suffix not in (".png", ".parquet"):
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
                wrong += [f"{name}:{number} {found}" for found in pattern.findall(line)]
    assert not wrong, "\n".join(wrong)


def test_help_comes_at_once_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom winnow.rl import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = [m for m in ('torch', 'ray', 'transformers', 'numpy', 'omegaconf') if m in sys.modules]\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "pipeline" in done.stdout
