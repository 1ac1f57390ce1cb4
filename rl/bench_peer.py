"""vLLM's rows of `winnow bench rollout --suite`: `bench_vllm.py` in a process of its own, its time bounded, ended with its children."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from winnow.rl.bench_models import SHAPES
from winnow.rl.bench_steps import STEPS, VOCAB, Note
from winnow.rl.children import end, start

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
            failed = read_peer(command, Path(scratch, "log"), VLLM_S, lambda row: note({"engine": "vllm", **row}))
            if failed:
                note({"engine": "vllm", "row": part, "failed": failed})


def read_peer(command: Sequence[str], log: Path, seconds: float, note: Note) -> str | None:
    """Notes the `ROW` lines of a process until its line `END`, and ends it with all that it started. Returns why it did not come so far.

    END is waited for, not the end of its output: an engine's process inherits that, and outlives the one that started it.
    """
    process, late = start(command, log, piped=True), threading.Event()

    def stop() -> None:
        late.set()
        end(process)

    timer = threading.Timer(max(0.0, seconds), stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                note(json.loads(line[4:]))
            elif line.strip() == "END":
                return None
    finally:
        timer.cancel()
        end(process)
    why = f"stopped after {seconds:g} s" if late.is_set() else f"exit code {process.returncode}"
    return f"{why}: {log.read_text()[-1500:]}"
