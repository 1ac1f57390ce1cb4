"""`winnow pipeline CONFIG --mixing`: one mixed run over all domains against a run for each alone, at equal total compute.

    base ─> convert ─┬─> alone-D (RL on D, `specialist.schedule.steps` steps)          for every domain D
                     └─> mixed   (RL on all, as many steps: each has every domain's quota, so prompts and samples are the same in all)
    every model on every domain's held-out tasks ─> table of rewards, change over the base task by task, KL(base || model)

Stages are kept and restarted as those of a pipeline (pipeline.py); result.json and mixing.md in the folder hold the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.rl.cluster import Cluster
from winnow.rl.config import Config
from winnow.rl.forgetting import base_replies, forgetting, forward_kl
from winnow.rl.pipeline import Pipeline
from winnow.rl.run import code_version

ALONE = "alone-"


class Mixing(Pipeline):
    """A pipeline without data and student."""

    def run(self) -> dict[str, Any]:
        """Does what is left to do; returns and writes result.json, and the table as mixing.md."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._exits:
            try:
                result = self._stages()
            finally:
                self._lanes.close()
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        text = as_markdown(result)
        (self.folder / "mixing.md").write_text(text)
        self._progress(text)
        return result

    def _stages(self) -> dict[str, Any]:
        base = self._convert(self._base())
        models = {"base": base}
        for domain in self.config.domains:
            models[f"{ALONE}{domain}"] = self._reinforce("specialist", base, domain)
        models["mixed"] = self._reinforce("mixed", base)
        evaluation = {name: self._evaluate(name, path) for name, path in models.items()}
        answers = self.folder / "evaluation"
        runs = {
            name: self.folder / ("mixed" if name == "mixed" else f"specialist-{name.removeprefix(ALONE)}")
            for name in models
        }
        return {
            "status": "done", "version": code_version(), "models": models, "evaluation": evaluation,
            "forgetting": forgetting(answers, list(models), prefix=ALONE),
            "kl": self._drift(models),
            "compute": {name: spent(run) for name, run in runs.items() if (run / "metrics.jsonl").is_file()},
            "gradient": shares(runs["mixed"]),
        }  # fmt: skip

    def _reinforce(self, stage: str, model: str, domain: str | None = None) -> str:
        """As a pipeline's, with the mixed run as long as each of the others."""
        steps = self.config.stage_run("specialist", model, self.config.domains[0]).schedule.steps
        same = {**self.config.mixed, "schedule": {**self.config.mixed.get("schedule", {}), "steps": steps}}
        self.config = dataclasses.replace(self.config, mixed=same)
        return super()._reinforce(stage, model, domain)

    def _drift(self, models: Mapping[str, str]) -> dict[str, Any]:
        """model -> domain -> KL(base || model) on the base's held-out replies."""
        replies = base_replies(self.folder / "evaluation" / "base.jsonl")

        def scores(path: str) -> Any:
            config: Config = self.config.stage_run("evaluation", path)

            def ask(cluster: Cluster) -> Any:
                learner: Any = cluster.learner
                return learner.logprobs(replies)

            return self._on_a_cluster(config, ask)

        def make() -> dict[str, Any]:
            start = scores(models["base"])
            return {
                "kl": {
                    name: forward_kl(replies, start, scores(path)) for name, path in models.items() if name != "base"
                }
            }

        inputs = {name: self._identity(path) for name, path in models.items()}
        return dict(self.manifest.stage("kl", inputs, make)["kl"])


def spent(run: Path) -> dict[str, float]:
    """Steps, samples, generated tokens and seconds of an RL run, from its metrics."""
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["step"]]
    seconds = [sum(value for name, value in row.items() if name.startswith("time/")) for row in rows]
    return {
        "steps": len(rows),
        "samples": round(sum(row["samples_per_s"] * s for row, s in zip(rows, seconds, strict=True))),
        "tokens": round(sum(row["tokens/rollout_per_s"] * row["time/rollout_s"] for row in rows)),
        "seconds": round(sum(seconds), 1),
    }


def shares(run: Path) -> dict[str, float]:
    """domain -> its mean share of the gradient's norm over the mixed run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("grad_share/"):
                found.setdefault(name.removeprefix("grad_share/"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Held-out tasks solved by model and domain; changes over the base; the distance from it; what each run cost."""
    domains = list(result["evaluation"]["base"])
    head = ["| | " + " | ".join(domains) + " | samples | tokens | s |", "| --- " * (len(domains) + 4) + "|"]
    rows = []
    for name, found in result["evaluation"].items():
        cost = result["compute"].get(name, {})
        cells = [f"{found[d]['mean']:.3f} ({found[d]['low']:.2f}-{found[d]['high']:.2f})" for d in domains]
        cells += [f"{cost[key]:,.0f}" if cost else "-" for key in ("samples", "tokens", "seconds")]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    parts = ["Held-out tasks solved (95 % interval), and what the run cost:", "", *head, *rows]
    changes = [
        f"| {name} | "
        + " | ".join(_change(result["forgetting"][name].get(d, {}).get("over_base")) for d in domains)
        + f" | {_mean_kl(result['kl'][name])} |"
        for name in result["evaluation"]
        if name != "base"
    ]
    parts += [
        "",
        "Change over the base, task by task (95 % interval), and KL(base, model) per token of the base's held-out replies:",
        "",
    ]
    parts += ["| | " + " | ".join(domains) + " | KL |", "| --- " * (len(domains) + 2) + "|", *changes]
    against = ", ".join(
        f"{d} {_change(result['forgetting']['mixed'].get(d, {}).get('over_specialist'))}" for d in domains
    )
    parts += ["", f"The mixed run against each domain's own: {against}."]
    if result["gradient"]:
        parts += [
            "Share of the gradient's norm in the mixed run: "
            + ", ".join(f"{d} {s:.2f}" for d, s in result["gradient"].items())
            + "."
        ]
    return "\n".join(parts) + "\n"


def _change(found: Mapping[str, float] | None) -> str:
    return "-" if not found else f"{found['mean']:+.3f} ({found['low']:+.2f} to {found['high']:+.2f})"


def _mean_kl(by_domain: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {found['mean']:.2g}" for name, found in by_domain.items())
