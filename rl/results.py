"""What a pipeline found, as result.json and as text: held-out tasks solved by domain and model, and what each model cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from winnow.rl.forgetting import lines as forgetting_lines
from winnow.rl.manifest import Manifest

# columns of the result, in the order they are made; the last three are controls
MODELS = ("base", "specialist", "student", "mixed", "student-sft", "student-on_policy", "mixed-from-base")
FLOORS = ("random", "recent")


def summary(models: Mapping[str, str], evaluation: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """result.json: `domains` holds the share of held-out tasks solved; `evaluation` all figures by model and domain."""
    domains: dict[str, dict[str, float]] = {}
    for name, results in evaluation.items():
        for domain, result in results.items():
            column = "specialist" if name == f"specialist-{domain}" else name
            domains.setdefault(domain, {})[column] = result["mean"]
            if result["constant"] is not None:
                domains[domain].setdefault("constant", result["constant"])
    stages = {name: note["seconds"] for name, note in manifest.notes.items()}
    cost = {name: round(spent(name, manifest), 1) for name in models}
    unit = "GPU seconds" if manifest.gpus else "seconds"
    found = {"domains": domains, "evaluation": dict(evaluation), "models": dict(models), "stages": stages}
    return {**found, "spent": cost, "spent_unit": unit}


def spent(model: str, manifest: Manifest) -> float:
    """GPU seconds (seconds without a GPU) of every stage after the conversion that a model needed."""
    if model.startswith("specialist-"):
        return manifest.spent(model)
    student = ("specialist-", "data-", "student")
    return {
        "student": lambda: manifest.spent(*student),
        "student-sft": lambda: manifest.spent("specialist-", "data-", "student-sft"),
        "student-on_policy": lambda: manifest.spent("specialist-", "student-on_policy"),
        "mixed": lambda: manifest.spent(*student, "mixed"),
        "mixed-from-base": lambda: manifest.spent("mixed-from-base"),
    }.get(model, lambda: 0.0)()


def result_table(result: Mapping[str, Any]) -> str:
    """Held-out tasks solved and mean rewards by domain and model, with 95 % intervals; then the floors and what attention saw."""
    lines = figures(result, "solved", "mean", "low", "high")
    graded = [
        d for d, row in result["domains"].items() if _partly(result, d)
    ]  # elsewhere the reward is the share solved
    if graded:
        lines += [
            "",
            *figures(
                {**result, "domains": {d: result["domains"][d] for d in graded}},
                "mean reward",
                "reward",
                "reward_low",
                "reward_high",
            ),
        ]
    last = list(result["models"])[-1]
    changes = forgetting_lines({last: result.get("forgetting", {}).get(last, {})})
    lines += ["", *changes, ""] if changes else [""]
    costs = [f"{name} {seconds:.0f}" for name, seconds in result.get("spent", {}).items() if seconds]
    if costs:
        lines.append(f"{result['spent_unit']} after the conversion: {', '.join(costs)}")
    for name, results in result["evaluation"].items():
        for domain, r in results.items():
            if name.endswith(FLOORS):
                rule = name.rsplit("-", 1)[1]
                lines.append(
                    f"{domain} with {rule} positions instead of the index: {r['mean']:.3f} ({r['low']:.2f}-{r['high']:.2f})"
                )
            elif name == last_model(result["models"]) and r["attention"]:
                a = r["attention"]
                lines.append(
                    f"{domain}: {a['mean_selected']:.1f} of {a['mean_available']:.1f} positions attended to, "
                    f"{a['sparse_rows']:.0%} of the queries see more than they may choose"
                )
    return "\n".join(lines).rstrip()


def last_model(models: Mapping[str, str]) -> str:
    """The one that the pipeline is for: the last that is no control."""
    return [name for name in models if name not in MODELS[4:]][-1]


def figures(result: Mapping[str, Any], title: str, middle: str, low: str, high: str) -> list[str]:
    """One table: a row a domain, a column a model."""
    columns = [c for c in MODELS if any(c in names for names in _columns(result))]
    solved = middle == "mean"
    rows = [[f"{title} (95 % interval)", *columns, *(["best constant"] if solved else []), "tasks"]]
    for domain in result["domains"]:
        cells, tasks = [], 0
        for column in columns:
            found = (
                result["evaluation"].get(f"specialist-{domain}" if column == "specialist" else column, {}).get(domain)
            )
            tasks = found["num_tasks"] if found else tasks
            cells.append(f"{found[middle]:.3f} ({found[low]:.2f}-{found[high]:.2f})" if found else "-")
        constant = [f"{result['domains'][domain].get('constant', 0.0):.3f}"] if solved else []
        rows.append([domain, *cells, *constant, str(tasks)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _columns(result: Mapping[str, Any]) -> list[list[str]]:
    return [["specialist" if name.startswith("specialist-") else name] for name in result["evaluation"]]


def _partly(result: Mapping[str, Any], domain: str) -> bool:
    """Whether the domain's reward is not simply 1 for a solved task and 0 for another."""
    return any(
        abs(r[domain]["reward"] - r[domain]["mean"]) > 1e-9 for r in result["evaluation"].values() if domain in r
    )
