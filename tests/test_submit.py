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

from winnow.rl.cli import main
from winnow.rl.submit import build_wheel, content_hash, find_address, pack_files, shipped_project, source_root


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
