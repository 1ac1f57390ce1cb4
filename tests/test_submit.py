"""Submission: what travels, under which name, and one job on a real head node of this machine, whose exit code comes back."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from winnow.rl import submit
from winnow.rl.cli import main
from winnow.rl.submit import (
    build_wheel,
    content_hash,
    exit_code,
    find_address,
    pack_files,
    shipped_project,
    source_root,
)


def test_local_configs_travel_flat_with_their_bases(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "my.yaml").write_text("base: common.yaml\nname: x\n")
    (folder / "common.yaml").write_text("seed: 1\n")
    words, packed = pack_files(["train", str(folder / "my.yaml"), "learner.lr=1", "demo"], tmp_path / "files")
    assert words == ["train", "my.yaml", "learner.lr=1", "demo"]
    assert sorted(file.name for file in packed.iterdir()) == ["common.yaml", "my.yaml"]


def test_two_files_of_one_name_and_a_base_elsewhere_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_text(f"name: {name}\n")
    with pytest.raises(ValueError, match=r"two different files are called c\.yaml"):
        pack_files(["train", str(tmp_path / "a/c.yaml"), str(tmp_path / "b/c.yaml")], tmp_path / "files")
    (tmp_path / "d.yaml").write_text("base: a/c.yaml\n")
    with pytest.raises(ValueError, match="put it beside d"):
        pack_files(["train", str(tmp_path / "d.yaml")], tmp_path / "more")


def test_the_shipped_project_has_no_dependencies_and_a_version_of_its_content(tmp_path: Path) -> None:
    text = (source_root() / "pyproject.toml").read_text()
    shipped = shipped_project(text, "abc")
    assert "dependencies = []" in shipped and '+abc"' in shipped and '"torch' not in shipped
    assert "[project.optional-dependencies]" in shipped, "nothing else is cut out"
    (tmp_path / "x").write_text("1")
    before = content_hash(tmp_path)
    (tmp_path / "x").write_text("2")
    assert content_hash(tmp_path) != before


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_address(None) == "http://127.0.0.1:8265"
    assert find_address("head:8265") == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://a:1")
    assert find_address(None) == "https://a:1"


def test_the_wheel_holds_every_room_and_the_source_stays_clean(tmp_path: Path) -> None:
    root = source_root()
    before = {path.name for path in root.iterdir()}
    wheel = build_wheel(tmp_path / "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ("kernels", "models", "rollout", "rewards", "distill", "rl"):
        assert {f"winnow/{room}/{file.name}" for file in (root / room).glob("*.py")} <= names
    assert "winnow/configs/demo.yaml" in names and not [name for name in names if name.endswith("__init__.py")]
    assert {path.name for path in root.iterdir()} == before


def test_a_build_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("import time\ntime.sleep(60)\n")  # found before the real one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(submit, "BUILD_TIMEOUT_S", 0.5)
    with pytest.raises(RuntimeError, match=r"pip did not build the wheel of .* within 0\.5 s: does `.* -m pip wheel"):
        build_wheel(tmp_path / "wheel")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node of its own, started in the foreground so that it ends with its process (`ray stop` would end others' as well)."""
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or shutil.which("ray")
    assert ray, "Ray's command is installed with it"
    port, web, client, agent = free_ports(4)
    command = [
        ray,
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--dashboard-port={web}",
        f"--ray-client-server-port={client}",
    ]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        "--num-cpus=2",
        "--include-dashboard=true",
        "--disable-usage-stats",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)  # the job must find winnow in the wheel that is shipped, not in this checkout
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w")
    head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", web)) == 0:
                break
        time.sleep(0.2)
    try:
        yield f"127.0.0.1:{web}"
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()


def test_a_job_runs_the_shipped_code_and_its_exit_code_comes_back(
    dashboard: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("name: travelled\nmodel: {path: somewhere}\ndomains: [{name: sums, source: addition}]\n")
    assert main(["submit", "--address", dashboard, "train", str(config), "--dry-run", "seed=7"]) == 0
    out, err = capfd.readouterr()
    assert "name: travelled" in out and "seed: 7" in out, "the job's log is followed"
    assert "SUCCEEDED" in err and "+" in err.split("winnow_rl-")[1].split("-py3")[0]
    assert main(["submit", "--address", dashboard, "train", str(config), "seed=-1"]) == 1
    out, err = capfd.readouterr()
    assert "seed is -1, but it must be >= 0" in out
    assert "FAILED" in err and "Traceback" not in err


# What a client without the models' libraries lacks. Ray, PyYAML and the build tools are there.
MODEL_LIBRARIES = (
    "torch",
    "transformers",
    "triton",
    "datasets",
    "safetensors",
    "tokenizers",
    "omegaconf",
    "math_verify",
)
CLIENT = """
import sys
BLOCKED = set(sys.argv[1].split(","))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed on this client")
sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} was not blocked")
from winnow.rl.cli import main
raise SystemExit(main(sys.argv[2:]))
"""


def client(*words: str) -> subprocess.CompletedProcess[str]:
    """`winnow WORDS` in a process that cannot import what the models need."""
    command = [sys.executable, "-c", CLIENT, ",".join(MODEL_LIBRARIES), *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_a_client_without_model_libraries_submits_and_lists_and_stops(
    dashboard: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("name: from-afar\nmodel: {path: somewhere}\ndomains: [{name: sums, source: addition}]\n")
    done = client("submit", "--address", dashboard, "--python", sys.executable, "train", str(config), "--dry-run")
    assert done.returncode == 0 and "name: from-afar" in done.stdout, done.stderr
    name = next(line for line in done.stderr.splitlines() if line.startswith("job ")).split()[1].rstrip(":")
    assert main(["submit", "--address", dashboard, "--list"]) == 0
    assert any(name in line and "SUCCEEDED" in line for line in capfd.readouterr().out.splitlines())
    assert main(["submit", "--address", dashboard, "--follow", name]) == 0
    assert "name: from-afar" in capfd.readouterr().out
    assert main(["submit", "--address", dashboard, "--stop", "nobody"]) == 1
    assert "has no job nobody; it has" in capfd.readouterr().err
    assert main(["submit", "--address", dashboard, "--stop", name]) == 0, "a job that is over is stopped"


def test_the_submit_path_imports_without_model_libraries() -> None:
    done = client("submit", "--address", "127.0.0.1:9", "--timeout", "1", "--list")
    assert done.returncode == 1 and "no Ray dashboard answers at http://127.0.0.1:9" in done.stderr, done.stderr


def test_exit_codes() -> None:
    codes = [exit_code("SUCCEEDED", 0), exit_code("FAILED", 2), exit_code("FAILED", None), exit_code("STOPPED", -15)]
    assert codes == [0, 2, 1, 130] and exit_code("FAILED", -9) == 1
    assert main_code("submit") == 2 and main_code("submit", "--list", "--stop", "x") == 2


def main_code(*words: str) -> int:
    try:
        return main(list(words))
    except SystemExit as end:
        return int(end.code or 0)


def test_the_specialists_configs_travel_with_their_pipeline(tmp_path: Path) -> None:
    (tmp_path / "maths.yaml").write_text("base: common.yaml\n")
    (tmp_path / "common.yaml").write_text("seed: 1\n")
    (tmp_path / "all.yaml").write_text("specialists: {maths: maths.yaml, logic: logic, agent: {learner: {lr: 1}}}\n")
    _, packed = pack_files(["pipeline", str(tmp_path / "all.yaml")], tmp_path / "files")
    assert sorted(file.name for file in packed.iterdir()) == ["all.yaml", "common.yaml", "maths.yaml"]
