"""`winnow submit`: a command of ours as a Ray job. Builds the wheel, ships it to every node, follows the log, returns the job's code.

Nothing here needs torch or transformers: a client has Ray, PyYAML and pip (setuptools where no package index is in reach). Exit codes: the command's own (0 done, 1 failed, 2
wrong usage), 130 for a job that was stopped.

this machine                                  the cluster
wheel of this source ──── py_modules ───────> every worker of the job imports it as winnow
local YAML files, flat ── working_dir ──────> where the command runs; results are written where runs_dir says
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
SUCCEEDED, FAILED, STOPPED = "SUCCEEDED", "FAILED", "STOPPED"
STOP_CODE = 130
WRITES = ("train", "distill", "pipeline")
BUILD_TIMEOUT_S = 300.0
MAX_FILE = 10 << 20  # bytes of a local file that travels with the job


def submit_job(
    command: Sequence[str],
    address: str | None,
    timeout_s: float,
    say: Callable[[str], object] = print,
    python: str | None = None,
    wait: bool = True,
) -> int:
    """Runs `winnow COMMAND` as a job of the cluster whose dashboard is at `address` (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then
    this machine's). Returns the command's exit code. Ctrl-C stops the job. Raises ValueError where no cluster answers.

    `python` is the interpreter on the head node; left out, it is this one for a cluster on this machine, else what `python` is there.
    """
    with tempfile.TemporaryDirectory(prefix="winnow-submit-") as scratch:
        words, working_dir = pack_files(command, Path(scratch) / "files")
        wheel = build_wheel(Path(scratch) / "wheel")
        place = find_address(address)
        client = connect_client(place, timeout_s)
        interpreter = python or (sys.executable if urlsplit(place).hostname in LOCAL else "python")
        say(f"submitting winnow {shlex.join(words)} with {wheel.name}")
        if words[0] in WRITES and not any(word.startswith("runs_dir=") for word in words):
            say(
                "the results will lie in the job's own folder on the head node: set runs_dir=FOLDER to choose a shared one"
            )
        name = client.submit_job(
            entrypoint=f"{shlex.quote(interpreter)} -m winnow.rl.cli {shlex.join(words)}",
            runtime_env={
                "py_modules": [str(wheel)],
                "working_dir": str(working_dir),
                "env_vars": {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"], "PYTHONUNBUFFERED": "1"},
            },
        )
        say(f"job {name}")
        if not wait:
            say(f"winnow submit --address {place} --follow {name} shows its log, --stop {name} ends it")
            return 0
        return await_job(client, name, say)


def await_job(client: Any, name: str, say: Callable[[str], object]) -> int:
    """Follows a job to its end and returns its exit code. Ctrl-C stops it."""
    try:
        status = follow(client, name)
    except KeyboardInterrupt:
        client.stop_job(name)
        say(f"job {name} was told to stop")
        raise
    info = client.get_job_info(name)
    why = (info.message or "").partition(", last available logs")[0]  # what follows repeats the log
    say(f"job {name}: {status}{f', {why}' if status != SUCCEEDED and why else ''}")
    return exit_code(status, getattr(info, "driver_exit_code", None))


def exit_code(status: str, of_driver: int | None) -> int:
    """0 for success, 130 for a stopped job, else the command's own code, 1 where Ray does not know it (a node that died)."""
    if status == SUCCEEDED:
        return 0
    return STOP_CODE if status == STOPPED else (of_driver if of_driver and 0 < of_driver < 256 else 1)


def list_jobs(address: str | None, timeout_s: float) -> list[str]:
    """A line a job of the cluster, the newest last: id, status, when it began, seconds so far, command."""
    client = connect_client(find_address(address), timeout_s)
    lines = []
    for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0):
        if job.submission_id is None:
            continue  # a driver that was not submitted
        begun = (job.start_time or 0) / 1000
        seconds = ((job.end_time or time.time() * 1000) / 1000 - begun) if begun else 0.0
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun)) if begun else "-"
        status = str(getattr(job.status, "value", job.status))
        lines.append(
            f"{job.submission_id}  {status:9}  {since}  {seconds:8.0f} s  {job.entrypoint.partition(' -m ')[2] or job.entrypoint}"
        )
    return lines


def stop_job(address: str | None, name: str, timeout_s: float, say: Callable[[str], object] = print) -> int:
    """Tells a job to stop and waits until it has. 0 when it is over; 1 when it is not within the time."""
    client = connect_client(find_address(address), timeout_s)
    known_job(client, name)
    client.stop_job(name)
    deadline = time.monotonic() + timeout_s
    while (status := str(client.get_job_status(name).value)) not in (SUCCEEDED, FAILED, STOPPED):
        if time.monotonic() > deadline:
            say(f"job {name} is still {status} after {timeout_s:.0f} s")
            return 1
        time.sleep(0.5)
    say(f"job {name}: {status}")
    return 0


def follow_job(address: str | None, name: str, timeout_s: float, say: Callable[[str], object] = print) -> int:
    """The log of a job from its beginning to its end; its exit code. Ctrl-C leaves the job alone."""
    client = connect_client(find_address(address), timeout_s)
    known_job(client, name)
    status = follow(client, name)
    say(f"job {name}: {status}")
    return exit_code(status, getattr(client.get_job_info(name), "driver_exit_code", None))


def known_job(client: Any, name: str) -> None:
    """Raises ValueError, with the jobs there are, for an unknown one."""
    names = [job.submission_id for job in client.list_jobs() if job.submission_id]
    if name not in names:
        raise ValueError(f"the cluster has no job {name}; it has {', '.join(names) or 'none'}")


def find_address(address: str | None) -> str:
    """The dashboard's address. A plain host:port is taken as http."""
    found = (
        address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    )
    return found if "://" in found else f"http://{found}"


def connect_client(address: str, timeout_s: float) -> Any:
    """A job client. Token authentication is used where RAY_AUTH_MODE, or a token of this user, says so; Ray's own client would turn it
    on at the head and off here as soon as a token file exists."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    os.environ.setdefault(
        "RAY_AUTH_MODE", "token" if token or (Path.home() / ".ray" / "auth_token").exists() else "disabled"
    )
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what they say about their uploads is not about the job

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return JobSubmissionClient(address)
        except ConnectionError as error:
            if time.monotonic() > deadline or "refused" in str(error) or "Failed to connect" in str(error):
                raise ValueError(
                    f"no Ray dashboard answers at {address}: start a cluster with `ray start --head`, or name its dashboard with --address"
                ) from error
        except RuntimeError as error:
            mode = os.environ["RAY_AUTH_MODE"]
            raise ValueError(
                f"the cluster at {address} refused this client (RAY_AUTH_MODE={mode}): {error}. Set RAY_AUTH_MODE to what the cluster was "
                "started with, token or disabled"
            ) from error
        time.sleep(1)


def follow(client: Any, name: str) -> str:
    """Prints the job's log to standard output as it grows, until the job ends; returns its last status."""
    shown = 0
    while True:
        status = str(client.get_job_status(name).value)
        log = client.get_job_logs(name)
        if len(log) > shown:
            sys.stdout.write(log[shown:])
            sys.stdout.flush()
            shown = len(log)
        if status in (SUCCEEDED, FAILED, STOPPED):
            return status
        time.sleep(0.5)


def pack_files(command: Sequence[str], folder: Path) -> tuple[list[str], Path]:
    """Copies the local YAML files that the command names (and the files that those name as `base:`) into `folder`, flat.

    Returns the command with their new names, and the folder. Raises ValueError for two files of one name and for one that is large.
    """
    folder.mkdir(parents=True)
    words = []
    for word in command:
        path = Path(word)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            words.append(word)
            continue
        copy_config(path, folder)
        words.append(path.name)
    return words, folder


def copy_config(path: Path, folder: Path) -> None:
    """The file and its `base:` files, which are named relative to it, under their own names."""
    import yaml

    target = folder / path.name
    if path.stat().st_size > MAX_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; a config file that travels with a job has at most {MAX_FILE}"
        )
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise ValueError(f"two different files are called {path.name}: they travel in one folder, so rename one")
    shutil.copyfile(path, target)
    values = yaml.safe_load(path.read_text()) or {}
    values = values if isinstance(values, dict) else {}
    own = values.get("specialists") or {}
    for name in (
        [n for n in own.values() if isinstance(n, str) and (path.parent / n).is_file()] if isinstance(own, dict) else []
    ):
        if "/" in name:
            raise ValueError(
                f"{path} names the specialist's config {name} in another folder: put it beside {path.name}"
            )
        copy_config(path.parent / name, folder)
    bases = values.get("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if "/" in base:
            raise ValueError(
                f"{path} names `base: {base}` in another folder, which does not travel with a job: put it beside {path.name}"
            )
        copy_config(path.parent / base, folder)


def build_wheel(folder: Path) -> Path:
    """The wheel of the source that this process runs. Built in a copy, so that nothing is left in the source folder."""
    source = source_root()
    folder.mkdir(parents=True)
    copy = folder / "source"
    rooms = [
        path.name
        for path in source.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.py"))
    ]
    for name in [*rooms, "configs"]:
        shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(source / name, copy / name)
    (copy / "pyproject.toml").write_text(shipped_project((source / "pyproject.toml").read_text(), content_hash(copy)))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    said = []
    for isolation in (
        ["--no-build-isolation"],
        [],
    ):  # with this Python's build tools; where they are missing or old, with fresh ones
        whole = [*command, *isolation, str(copy)]
        try:
            done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"pip did not build the wheel of {source} within {BUILD_TIMEOUT_S:g} s: does `{shlex.join(whole)}` hang by itself?"
            ) from None
        wheels = list(folder.glob("*.whl"))
        if not done.returncode and wheels:
            return wheels[0]
        said.append(" ".join((done.stderr or done.stdout).strip().splitlines()[-3:]))
    raise RuntimeError(
        f"the wheel of {source} could not be built, neither with what is installed here (pip install 'setuptools>=77' wheel): {said[0]}; "
        f"nor with build tools of pip's own: {said[1]}"
    )


def shipped_project(text: str, content: str) -> str:
    """pyproject.toml of the shipped wheel: no dependencies, and the content's hash in the version.

    Ray would install the dependencies, torch among them, anew for every job, though the nodes have them; and it keeps a wheel by its
    file name, so that without the hash a changed source of the same version would not be shipped at all.
    """
    text, dependencies = re.subn(r"(?ms)^dependencies = \[.*?^\]$", "dependencies = []", text)
    text, versions = re.subn(r'(?m)^version = "([^"+]+)"$', rf'version = "\1+{content}"', text)
    assert dependencies == 1 and versions == 1, "pyproject.toml no longer has the lines that are replaced here"
    return text


def content_hash(folder: Path) -> str:
    """12 hex digits of every file below the folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def source_root() -> Path:
    """The folder with pyproject.toml. Raises ValueError when winnow was installed without its source."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise ValueError(
            "winnow submit builds a wheel from the source, but this winnow was installed without it: run it from a checkout "
            "(pip install -e .)"
        )
    return root
