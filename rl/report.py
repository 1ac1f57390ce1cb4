"""The page of a run or a pipeline: one self-contained HTML file, inline SVG, light and dark, nothing fetched.

    run folder      metrics.jsonl, samples/, result.json                                  -> curves and samples
    pipeline folder result.json, manifest.json, the run folders in it, evaluation/, ...   -> results, curves of every stage, samples

A folder of a run that is still going on, or that failed, gives the page of what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from winnow.rl.charts import Interval, Series, interval_chart, line_chart, strip
from winnow.rl.report_style import page

MODELS = ("base", "specialist", "student", "mixed")
SAMPLES = 2  # a domain
CUT = 1500  # characters of a message
MAIN = 4  # the first of CURVES stand open, the others below a fold
# metric prefix or name, title, what it says, logarithmic
CURVES = (
    ("reward/", "Reward", "mean over the step's samples", False),
    ("length/", "Length", "generated tokens per sample", False),
    ("mismatch/k3_kl", "Mismatch", "k3 KL between rollout and learner, same weights", True),
    ("index/jaccard", "Index overlap", "Jaccard of the learner's sets and the rollout's", False),
    ("eval/", "Held-out tasks", "share solved", False),
    ("entropy", "Entropy", "nats per token", False),
    ("loss/indexer_kl", "Indexer KL", "to the attention over the chosen set", False),
    ("grad_norm", "Gradient norm", "before clipping", False),
    ("time/", "Seconds", "by part of the step", False),
)


def write_report(folder: str | Path, out: Path | None = None) -> Path:
    """Writes FOLDER/report.html (or `out`) and returns its path. Raises ValueError for a folder that holds no run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    is_pipeline = (folder / "manifest.json").is_file()
    if not is_pipeline and not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is not a run folder: it has neither metrics.jsonl nor a pipeline's manifest.json")
    body = "\n".join(pipeline_sections(folder) if is_pipeline else run_sections(folder))
    result = read_json(folder / "result.json")
    path = out or folder / "report.html"
    path.write_text(page(folder.resolve().name, lead(folder, result, is_pipeline), body), encoding="utf-8")
    return path


def lead(folder: Path, result: Mapping[str, Any], is_pipeline: bool) -> str:
    """The line below the title."""
    facts = [str(result.get("status", "not finished"))]
    if is_pipeline and "seconds" in result:
        facts.append(f"{sum(result.get('stages', {}).values()):.0f} s of work")
    if "step" in result:
        facts.append(f"step {result['step']} of {result['steps']}")
    if "version" in result:
        facts.append(f"winnow {result['version']}")
    return " · ".join(facts)


# ------------------------------------------------------------------------------------------------------------------------ pipeline


def pipeline_sections(folder: Path) -> Iterator[str]:
    result, manifest = read_json(folder / "result.json"), read_json(folder / "manifest.json")
    if result.get("evaluation"):
        yield from result_sections(result)
    answers = sorted((folder / "evaluation").glob("*.jsonl"))
    last = next((file for name in ("mixed", "student", "base") for file in answers if file.stem == name), None)
    rows = read_lines(last) if last else []
    yield from index_section(rows)
    for name in (path.name for path in sorted(folder.glob("specialist-*"))):
        yield section(
            f"Specialist: {name.removeprefix('specialist-')}", curves(read_lines(folder / name / "metrics.jsonl"))
        )
    if (folder / "mixed").is_dir():
        text = "One GRPO stage over all domains, from the student."
        metrics = read_lines(folder / "mixed" / "metrics.jsonl")
        yield section("Mixed stage", f"<p>{text}</p>" + curves(metrics))
        yield from reward_sections(metrics, "Mixed stage: rewards by part")
    yield from conversion_section(read_json(folder / "sparse" / "conversion.json"))
    yield from losses_section(manifest)
    yield from data_section(folder, manifest)
    yield from samples_section(rows, f"Answers of the {last.stem} model on held-out tasks" if last else "")
    yield stages_section(manifest)


def result_sections(result: Mapping[str, Any]) -> Iterator[str]:
    """A chart a domain, then the same as a table, with what attention saw."""
    cards, rows = [], []
    for domain in result["domains"]:
        intervals = []
        for name, results in result["evaluation"].items():
            if domain not in results or (name.startswith("specialist-") and name != f"specialist-{domain}"):
                continue
            r = results[domain]
            label = (
                "specialist"
                if name.startswith("specialist-")
                else name.replace("mixed-", "mixed, ").replace("student-", "student, ")
            )
            intervals.append(
                Interval(label, r["mean"], r["low"], r["high"], f"{r['num_tasks']} tasks, {r['length']:.1f} tokens")
            )
            a = r.get("attention") or {}
            sparse = f"{a['mean_selected']:.1f} of {a['mean_available']:.1f}, {a['sparse_rows']:.0%}" if a else "-"
            cells = [
                domain,
                label,
                f"{r['mean']:.3f}",
                f"{r['low']:.3f} – {r['high']:.3f}",
                r["num_tasks"],
                f"{r['reward']:.3f}",
            ]
            rows.append([*cells, f"{r['length']:.1f}", f"{r['truncated']:.0%}", r["failures"], sparse])
        constant = result["domains"][domain].get("constant")
        note = f"dashed: the best constant reply, {constant:.3f}" if constant is not None else ""
        chart = interval_chart(intervals, mark=constant, mark_label=note, label=f"solved tasks of {domain} by model")
        cards.append(card(domain, note, chart))
    head = (
        "domain",
        "model",
        "solved",
        "95 % interval",
        "tasks",
        "reward",
        "tokens",
        "cut off",
        "failures",
        "attended / seen, rows past k",
    )
    yield section(
        "Held-out tasks solved",
        "<p>Share of held-out tasks solved, with 95 % intervals. The specialist was trained on its own domain only; the student "
        "learned from the specialists’ verified data; the mixed model is the student after one GRPO stage over all domains.</p>"
        + grid(cards, "grid few")
        + details("The figures", table(head, rows)),
    )


def conversion_section(report: Mapping[str, Any]) -> Iterator[str]:
    from winnow.rl.conversion_page import sections  # it is built of this file's pieces

    if report:
        yield from sections(report)


def losses_section(manifest: Mapping[str, Any]) -> Iterator[str]:
    cards = []
    for stage, key, title in (("base", "loss", "Base model"), ("student", "losses", "Student")):
        values = manifest.get(stage, {}).get("output", {}).get(key, [])
        if values:
            cards.append(card(title, "cross-entropy per step", _curve("loss", values)))
    if cards:
        yield section("Supervised training", grid(cards))


def data_section(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, note in manifest.items():
        if not name.startswith("data-"):
            continue
        for domain, sampled in note["output"].get("sampled", {}).items():
            dropped = ", ".join(f"{why} {count}" for why, count in note["output"]["dropped"].get(domain, {}).items())
            rows.append(
                [
                    domain,
                    sampled,
                    f"{note['output']['pass_rate'][domain]:.1%}",
                    note["output"]["kept"].get(domain, 0),
                    dropped or "-",
                ]
            )
    if rows:
        yield section(
            "Specialists’ verified data", table(("domain", "samples", "pass rate", "rows kept", "dropped"), rows)
        )


def stages_section(manifest: Mapping[str, Any]) -> str:
    rows = [[name, f"{note['seconds']:.1f}"] for name, note in manifest.items()]
    return section("Stages", table(("stage", "seconds"), rows))


# ----------------------------------------------------------------------------------------------------------------------------- runs


def run_sections(folder: Path) -> Iterator[str]:
    metrics = read_lines(folder / "metrics.jsonl")
    yield section("Curves", curves(metrics))
    yield from reward_sections(metrics)
    files = sorted((folder / "samples").glob("*.jsonl"))
    tests = sorted((folder / "evaluations").glob("*.jsonl"))
    yield from index_section(read_lines(tests[-1]) if tests else read_lines(files[-1]) if files else [])
    if files:
        yield from samples_section(read_lines(files[-1]), f"Samples of {files[-1].stem}")


def reward_sections(metrics: Sequence[Mapping[str, Any]], title: str = "Rewards by part") -> Iterator[str]:
    from winnow.rl.reward_page import sections  # it is built of this file's pieces

    yield from sections(metrics, title)


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A chart for each of CURVES that the run has."""
    if not metrics:
        return '<p class="quiet">no step yet</p>'
    names = list(dict.fromkeys(name for line in metrics for name in line))
    steps = [line["step"] for line in metrics]
    cards = []
    for key, title, note, log in CURVES:
        found = [n for n in names if (n.startswith(key) if key.endswith("/") else n == key)]
        if "reward/mean" in found and len(found) == 2:
            found.remove("reward/mean")
        if key == "eval/":
            found = [name for name in found if "_" not in name]
        series = [Series(curve_name(n), steps, [line.get(n) for line in metrics]) for n in found]
        if series:
            cards.append(card(title, note, line_chart(series, log=log, label=title)))
    return grid(cards[:MAIN]) + (details("More curves", grid(cards[MAIN:])) if cards[MAIN:] else "")


def curve_name(metric: str) -> str:
    """What a curve is called in its chart: the domain, or the part of the step."""
    group, _, name = metric.rpartition("/")
    return name.removesuffix("_s") if group in ("reward", "length", "eval", "time") else ""


def index_section(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the index chose for the first generated tokens of a few answers."""
    blocks, seen = [], set()
    for row in rows:
        excerpt = row.get("index_excerpt")
        if not excerpt or row["domain"] in seen:
            continue
        seen.add(row["domain"])
        blocks.append(index_block(row, excerpt))
    if blocks:
        yield section(
            "What the index chose",
            "<p>For the query that drew the first token of an answer: the darker a token, the more layers chose it; below, the chosen "
            "positions layer by layer. The line marks the query itself.</p>" + "".join(blocks),
        )


def index_block(row: Mapping[str, Any], excerpt: Mapping[str, Any]) -> str:
    query = excerpt["queries"][0]
    layers = query["layers"]
    weight = [
        sum(position in chosen for chosen in layers.values()) / len(layers) for position in range(excerpt["length"])
    ]
    spans = []
    for position, text in enumerate(excerpt["tokens"][: query["position"] + 2]):
        mark = " query" if position == query["position"] else " drawn" if position == query["position"] + 1 else ""
        hover = f"position {position}, chosen by {round(weight[position] * len(layers))} of {len(layers)} layers"
        spans.append(
            f'<span class="tok{mark}" style="--w:{weight[position]:.2f}" title="{hover}">{escape(text)}</span>'
        )
    text = f'<p class="tokens">{"".join(spans)}</p>' if spans else ""
    chart = strip(
        excerpt["length"],
        [(f"layer {n}", chosen) for n, chosen in layers.items()],
        query["position"],
        "chosen positions",
    )
    title = f"{row['domain']}: {excerpt['k']} of {query['position'] + 1} positions"
    return f'<div class="card wide"><h3>{escape(title)}</h3>{text}{chart}</div>'


def samples_section(rows: Sequence[Mapping[str, Any]], title: str) -> Iterator[str]:
    """A solved and an unsolved sample of each domain, with the parts of their rewards."""
    by_domain: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_domain.setdefault(row["domain"], []).append(row)
    blocks = []
    for members in by_domain.values():
        ranked = sorted((r for r in members if "reward" in r), key=lambda r: r["reward"])
        picked = [ranked[-1], ranked[0]] if len(ranked) > 1 else ranked
        blocks += [sample_block(row) for row in picked[:SAMPLES]]
    if blocks:
        yield section(title, grid(blocks))


def sample_block(row: Mapping[str, Any]) -> str:
    turns = "".join(
        f'<div class="turn {escape(m["role"])}"><b>{escape(m["role"])}</b> {escape(m["content"][:CUT])}</div>'
        for m in row["messages"]
    )
    parts = " ".join(f"<span>{escape(name)} {value:g}</span>" for name, value in row.get("parts", {}).items())
    gold = f"<span>answer {escape(str(row['answer']))}</span>" if row.get("answer") is not None else ""
    head = f"{escape(row['domain'])} · reward {row['reward']:g} · {escape(row['finish_reason'])}"
    return f'<div class="card"><h3>{head}</h3>{turns}<p class="parts">{gold} {parts}</p></div>'


# ---------------------------------------------------------------------------------------------------------------------------- pieces


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def card(title: str, note: str, body: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p>{body}</div>'


def grid(cards: Sequence[str], kind: str = "grid") -> str:
    return f'<div class="{kind}">{"".join(cards)}</div>'


def details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _curve(name: str, values: Sequence[float]) -> str:
    return line_chart([Series(name, range(1, len(values) + 1), values)], label=name)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; one cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
