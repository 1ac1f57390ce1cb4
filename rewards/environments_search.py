"""Search in a corpus of texts: questions whose answer takes two or three documents. BM25, nothing to install, the same on every machine."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log
from pathlib import Path
from random import Random
from typing import Any

from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, metadata, tool
from winnow.rollout.schema import Message, Task

K1, B = 1.5, 0.75  # Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009
SNIPPET = 80
WORD = re.compile(r"\w+")

FIRST_TEXT = "Ada Boris Carla Dmitri Elena Farid Greta Hugo Ines Jonas Katya Lars Mara Nils Olga Pavel"
FIRST = FIRST_TEXT.split()
LAST_TEXT = "Moss Vane Holt Kerr Lund Marsh Nash Oakes Pell Quill Rowe Stark Thorn Ulm Voss Wren"
LAST = LAST_TEXT.split()
TOWNS_TEXT = "Varo Keth Odran Silm Tarn Ulvo Brask Dorn Elsk Fenn Grolt Hask Jorv Krell Lunt Morv"
TOWNS = TOWNS_TEXT.split()
TRADES_TEXT = "baker potter weaver smith painter farmer sailor tailor"
TRADES = TRADES_TEXT.split()


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


class Index:
    """BM25 over documents {"id", "title", "text"}; equal scores keep the documents' order."""

    def __init__(self, documents: Sequence[Mapping[str, str]]) -> None:
        self.documents = {str(document["id"]): document for document in documents}
        self.counts = {key: Counter(words(f"{d['title']} {d['text']}")) for key, d in self.documents.items()}
        self.lengths = {key: sum(counts.values()) for key, counts in self.counts.items()}
        self.mean = sum(self.lengths.values()) / max(1, len(self.lengths))
        self.having = Counter(word for counts in self.counts.values() for word in counts)

    def search(self, query: str, limit: int) -> list[Mapping[str, str]]:
        scores: dict[str, float] = {}
        for word in dict.fromkeys(words(query)[:32]):
            if word not in self.having:
                continue
            weight = log(1 + (len(self.documents) - self.having[word] + 0.5) / (self.having[word] + 0.5))
            for key, counts in self.counts.items():
                if counts[word]:
                    damped = counts[word] + K1 * (1 - B + B * self.lengths[key] / self.mean)
                    scores[key] = scores.get(key, 0.0) + weight * counts[word] * (K1 + 1) / damped
        best = sorted(scores, key=lambda key: -scores[key])[:limit]
        return [self.documents[key] for key in best]


@lru_cache(maxsize=4)
def corpus_file(path: str) -> Index:
    """The index of a JSONL file of documents. Raises ValueError naming the line."""
    documents = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"id", "title", "text"} <= row.keys():
            raise ValueError(f"{path}:{number}: a document has id, title and text, this line has {', '.join(row)}")
        documents.append(row)
    return Index(documents)


class Search(Toolbox):
    """Tools `search` and `open_document`. The corpus is `metadata["documents"]`, or the JSONL file `metadata["corpus"]`."""

    def begin(self, task: Task) -> None:
        file = task.metadata.get("corpus")
        self.index = corpus_file(str(file)) if file else Index(metadata(task, "documents", "search"))

    def tools(self) -> Sequence[Tool]:
        limit = {"type": "integer", "minimum": 1, "maximum": 10, "default": 3}
        return (
            tool(
                "search",
                "the documents that fit best: id, title, beginning",
                self.search,
                query="string: words",
                limit=limit,
            ),
            tool("open_document", "the whole text of a document", self.open_document, id="string: as search names it"),
        )

    def search(self, query: str, limit: int) -> str:
        found = self.index.search(query, limit)
        return "\n".join(f"{d['id']} | {d['title']} | {d['text'][:SNIPPET]}" for d in found) or "nothing found"

    def open_document(self, id: str) -> str:
        if id not in self.index.documents:
            raise ToolError(f"there is no document {id[:40]!r}: take an id that search gave")
        return self.index.documents[id]["text"]

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        gold = words(metadata(task, "answer", "search") if task.answer is None else task.answer)
        found = words(self.answer or "")
        # the answer, and no list of all that was read: at most a short sentence
        right = len(found) <= len(gold) + 12 and any(found[i : i + len(gold)] == gold for i in range(len(found)))
        rivals = task.metadata.get("rivals", ())
        right = right and not any(words(rival) != gold and set(words(rival)) <= set(found) for rival in rivals)
        return float(right and self.calls > self.errors), {"right": float(right)}


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Who governs which town, when people were born, what they do: level 1 asks for one step, 2 for two, 3 for three."""
    towns, people = (
        rng.sample(TOWNS, 12),
        [f"{a} {b}" for a, b in zip(rng.sample(FIRST, 12), rng.sample(LAST, 12), strict=True)],
    )
    born = dict(zip(people, rng.sample(range(1900, 1999), 12), strict=True))
    teacher = dict(zip(people, people[1:] + people[:1], strict=True))
    trade = {person: rng.choice(TRADES) for person in people}
    documents = [
        {"id": f"town-{i}", "title": town, "text": f"{town} is a town by the river. Its mayor is {person}."}
        for i, (town, person) in enumerate(zip(towns, people, strict=True))
    ]
    documents += [
        {
            "id": f"person-{i}",
            "title": person,
            "text": f"{person} is a {trade[person]} and learned the trade from {teacher[person]}. "
            f"In the records of the town the year of birth is given as {born[person]}.",
        }
        for i, person in enumerate(people)
    ]
    rng.shuffle(documents)
    place = rng.randrange(12)
    mayor = people[place]
    path = [towns[place], mayor, teacher[mayor]][: max(2, level) if level > 1 else 1]
    question = {
        1: f"Who is the mayor of {towns[place]}?",
        2: f"In which year was the mayor of {towns[place]} born?",
        3: f"In which year was the teacher of the mayor of {towns[place]} born?",
    }[level]
    answer = {1: mayor, 2: str(born[mayor]), 3: str(born[teacher[mayor]])}[level]
    rivals = people if level == 1 else [str(year) for year in born.values()]
    return {
        "text": f"{question} Answer with the {'name' if level == 1 else 'year'}.",
        "answer": answer,
        "metadata": {"documents": documents, "solution": path, "rivals": rivals},
    }


def expert(task: Task, messages: Sequence[Message]) -> str:
    turn = sum(message["role"] == "assistant" for message in messages)
    if turn == 2 * len(task.metadata["solution"]):
        return f"It is {task.answer}."
    title = task.metadata["solution"][turn // 2]
    if turn % 2 == 0:
        return call_text("search", query=title)
    found = next(line.split(" | ") for line in messages[-1]["content"].splitlines() if line.split(" | ")[1] == title)
    return call_text("open_document", id=found[0])
