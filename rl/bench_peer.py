"""vLLM's rows of `winnow bench rollout --suite`: `bench_vllm.py` in a process of its own, its time bounded, ended with its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from winnow.rl.bench_models import SHAPES
from winnow.rl.bench_steps import STEPS, VOCAB, Note

VLLM_S = 420  # of one vLLM process


def vllm_rows(
    shape: str, rows: Sequence[tuple[int, int]], prefill: Sequence[int], small: Sequence[int], note: Note, only: Sequence[str] = ("decode", "small"),
) -> None:  # fmt: skip
    """vLLM's rows, each noted as it comes; a process that dies or outlasts its time costs the rest, and the row says why."""
    for part in only:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
            whole = part == "small"
            config = SHAPES["smollm2-135m" if whole else shape]
            plan = {"part": part, "rows": list(rows), "prefill": list(prefill), "small": list(small), "family": config[0],
                    "config": {**config[1], **({} if whole else VOCAB.get(shape, {}))}, "steps": STEPS, "folder": scratch}  # fmt: skip
            Path(scratch, "plan.json").write_text(json.dumps(plan))
            command = [sys.executable, "-m", "winnow.rl.bench_vllm", str(Path(scratch, "plan.json"))]
            with open(Path(scratch, "log"), "w") as log:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
                )
                deadline = time.monotonic() + VLLM_S
                try:
                    _read_rows(process, deadline, note)
                finally:
                    _end(process)
            if process.returncode:
                tail = Path(scratch, "log").read_text()[-1500:]
                note({"engine": "vllm", "row": part, "failed": f"exit code {process.returncode}: {tail}"})


def _read_rows(process: subprocess.Popen[str], deadline: float, note: Note) -> None:
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("ROW "):
                note({"engine": "vllm", **json.loads(line[4:])})
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass  # `_end` names and ends it
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and those that it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
