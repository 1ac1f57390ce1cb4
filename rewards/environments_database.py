"""A SQLite database in memory: questions answered from it, and changes to it that a query verifies.

Statements are bounded: a count of virtual machine instructions instead of a clock (so an episode is the same on every machine), the size
of texts and of the database, the rows shown. ATTACH, PRAGMA and extensions are refused.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from random import Random
from typing import Any

from winnow.rewards.reasoning import last_number, numbers
from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, metadata, tool
from winnow.rollout.schema import Message, Task

STEPS = 2_000_000  # instructions of one statement
MAX_ROWS = 50
MAX_PAGES = 2000  # of 4 KB
MAX_TEXT = 1_000_000
DENIED = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA)

NAMES_TEXT = "Ada Ben Cleo Dan Eli Fay Gus Hal Ivy Jon Kim Leo Mia Ned Ola Pam Quin Ray Sue Tom"
NAMES = NAMES_TEXT.split()
TEAMS_TEXT = "north south east west"
TEAMS = TEAMS_TEXT.split()
GOODS_TEXT = "lamp rope kite bell drum cake boat ring"
GOODS = GOODS_TEXT.split()


def open_database(script: str) -> sqlite3.Connection:
    """A new database built by a script, closed to the outside from then on."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA max_page_count={MAX_PAGES}")
    connection.executescript(script)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in DENIED else sqlite3.SQLITE_OK)
    return connection


def run(
    connection: sqlite3.Connection, statement: str, rows: int = MAX_ROWS
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and the first `rows` + 1 rows of one statement. Raises ToolError."""
    spent = 0

    def tick() -> int:
        nonlocal spent
        spent += 1
        return int(spent * 1000 > STEPS)

    connection.set_progress_handler(tick, 1000)
    try:
        cursor = connection.execute(statement)
        return [column[0] for column in cursor.description or ()], cursor.fetchmany(rows + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        raise ToolError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.set_progress_handler(None, 0)


class Database(Toolbox):
    """One tool, `sql`. `task.metadata["script"]` builds the database; `check` ({"sql", "rows"}) verifies a change, `answer` a reply."""

    def begin(self, task: Task) -> None:
        self.connection = open_database(metadata(task, "script", "database"))

    def tools(self) -> Sequence[Tool]:
        return (tool("sql", "runs one SQLite statement on the database", self.sql, statement="string: one statement"),)

    def sql(self, statement: str) -> str:
        columns, rows = run(self.connection, statement)
        if not columns:
            return "done"
        more = f"\n... more than {MAX_ROWS} rows" if len(rows) > MAX_ROWS else ""
        return "\n".join([" | ".join(columns), *(" | ".join(map(str, row)) for row in rows[:MAX_ROWS])]) + more

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        check = task.metadata.get("check")
        if check is None:
            gold = task.answer or ""
            found = self.answer or ""
            right = gold in found.split() or (
                last_number(found) is not None and numbers(gold)[-1:] == [last_number(found)]
            )
            return float(right and self.calls > self.errors), {"right": float(right)}
        try:
            _, rows = run(self.connection, check["sql"], len(check["rows"]))
        except ToolError:  # e.g. the table was dropped
            rows = []
        right = json.loads(json.dumps(rows)) == check["rows"]
        return float(right), {"right": float(right), "finished": float(self.answer is not None)}


def world(rng: Random) -> str:
    """Twelve people in four teams, thirty orders."""
    people = rng.sample(NAMES, 12)
    lines = ["CREATE TABLE people(id INTEGER PRIMARY KEY, name TEXT, team TEXT, pay INTEGER);"]
    lines += [
        f"INSERT INTO people VALUES({i}, '{name}', '{TEAMS[i % 4]}', {rng.randint(20, 99)});"
        for i, name in enumerate(people, 1)
    ]
    lines.append(
        "CREATE TABLE orders(id INTEGER PRIMARY KEY, person INTEGER REFERENCES people(id), good TEXT, amount INTEGER);"
    )
    lines += [
        f"INSERT INTO orders VALUES({i}, {rng.randint(1, 12)}, '{rng.choice(GOODS)}', {rng.randint(1, 40)});"
        for i in range(1, 31)
    ]
    return "\n".join(lines)


SHOWN = "Tables: people(id, name, team, pay), orders(id, person, good, amount), where orders.person is people.id."


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Level 1: a sum in one table; 2: over both; 3: a change, verified by a query."""
    script, team, good, raise_by = world(rng), rng.choice(TEAMS), rng.choice(GOODS), rng.randint(3, 9)
    connection = open_database(script)
    if level < 3:
        joined = "FROM people JOIN orders ON orders.person = people.id"
        query, question = (
            (f"SELECT sum(pay) FROM people WHERE team = '{team}'", f"What is the sum of the pay in team {team}?")
            if level == 1
            else (
                f"SELECT coalesce(sum(amount), 0) {joined} WHERE team = '{team}' AND pay > 40",
                f"What is the total amount ordered by the people of team {team} whose pay is above 40?",
            )
        )
        answer = str(run(connection, query)[1][0][0])
        return {"text": f"{SHOWN}\n{question}", "answer": answer, "metadata": {"script": script, "solution": [query]}}
    changes = [
        f"UPDATE people SET pay = pay + {raise_by} WHERE team = '{team}'",
        f"DELETE FROM orders WHERE good = '{good}'",
    ]
    for change in changes:
        run(connection, change)
    check = "SELECT 'p', id, name, team, pay FROM people UNION ALL SELECT 'o', id, person, good, amount FROM orders ORDER BY 1, 2"
    rows = json.loads(json.dumps(run(connection, check, 1000)[1]))
    text = f"{SHOWN}\nRaise the pay of everybody in team {team} by {raise_by}, delete all orders of {good}s, change nothing else."
    return {"text": text, "metadata": {"script": script, "solution": changes, "check": {"sql": check, "rows": rows}}}


def expert(task: Task, messages: Sequence[Message]) -> str:
    if messages[-1]["role"] != "tool":
        return " ".join(call_text("sql", statement=statement) for statement in task.metadata["solution"])
    return "Done." if "check" in task.metadata else f"It is {messages[-1]['content'].splitlines()[-1]}."
