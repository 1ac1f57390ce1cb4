"""Environments: experts, luck and malformed calls; schemas; escapes; 1,000 random episodes through the multi-turn loop."""

from __future__ import annotations

import json
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from winnow.rewards.baseline import play
from winnow.rewards.data import load_tasks
from winnow.rewards.environments import KINDS, environment_tasks, expert, malformed_agent, random_agent
from winnow.rewards.environments_database import open_database, run
from winnow.rewards.registry import get_reward, make_environment
from winnow.rewards.toolbox import Toolbox, ToolError, call_text, check_arguments, parse_calls, tool
from winnow.rollout.episode import EpisodeRunner
from winnow.rollout.schema import Environment, Failure, Request, Sampling, Score, Task
from winnow.rollout.sequence import Sequence
from winnow.rollout.template import ChatTemplate

LEVELS = (1, 2, 3)
QUICK = [kind for kind in KINDS if kind != "interpreter"]


def graded(task: Task, agent: Any, max_turns: int = 12) -> tuple[Score, Any]:
    trajectory = play(task, agent, max_turns)
    score = get_reward("environment")(task, trajectory)
    assert isinstance(score, Score), score
    return score, trajectory


@pytest.mark.parametrize("kind", KINDS)
def test_experts_solve_luck_does_not_and_malformed_calls_are_answered(kind: str) -> None:
    count = 30 if kind in QUICK else 3
    luck = []
    for level in LEVELS:
        for number, task in enumerate(environment_tasks(kind, level, count, seed=level)):
            score, trajectory = graded(task, expert(task))
            assert score.value == 1 and score.parts["clean"] == 1, (task.messages, trajectory.messages)
            assert trajectory.finish_reason == "done"
            luck.append(graded(task, random_agent(task, Random(number)))[0].value)
            score, trajectory = graded(task, malformed_agent(task, Random(number)), max_turns=6)
            answers = [m["content"] for m in trajectory.messages if m["role"] == "tool"]
            assert len(answers) >= 6 and all(a.startswith("error:") for a in answers), answers
            assert score.value == 0 and score.parts["clean"] == 0
            assert graded(task, lambda _: "")[0].value == 0
            if task.answer is not None:
                assert graded(task, lambda _: task.answer)[0].value == 0 or kind in ("calculator", "interpreter")  # noqa: B023
    assert np.mean(luck) < 0.2, luck


@pytest.mark.parametrize("kind", QUICK)
def test_the_same_seed_gives_the_same_tasks_and_episodes(kind: str) -> None:
    tasks = environment_tasks(kind, 2, 12, seed=5)
    assert tasks == environment_tasks(kind, 2, 12, seed=5) == load_tasks(kind, count=12, seed=5, level=2)
    held = environment_tasks(kind, 2, 12, seed=5, split="heldout")
    assert not {t.id for t in tasks} & {t.id for t in held} and tasks != environment_tasks(kind, 2, 12, seed=6)
    for task in tasks[:4]:
        first, second = (play(task, random_agent(task, Random(3)), 8) for _ in range(2))
        assert first.messages == second.messages and first.environment_state == second.environment_state
        json.dumps(first.environment_state)
        assert isinstance(make_environment(kind), Environment)
        assert "Tools:" in task.messages[0]["content"] and task.messages[0]["role"] == "system"


def test_an_environment_forgets_its_last_episode() -> None:
    for kind in QUICK:
        task = environment_tasks(kind, 3, 1)[0]
        environment = make_environment(kind)
        used = play(task, expert(task), 12).environment_state
        for _ in range(2):
            environment.reset(task)
            assert environment.state()["calls"] == 0 and environment.state()["reward"] == 0
            messages = list(task.messages)
            while True:
                messages.append({"role": "assistant", "content": expert(task)(messages)})
                step = environment.step(messages[-1]["content"])
                messages += step.messages
                if step.done:
                    break
            assert environment.state() == used


class World:
    """The part of a verifiers environment that the adapter speaks to: async methods, a state shared by key, a rubric."""

    def __init__(self) -> None:
        self.rubric = self

    async def setup_state(self, state: dict) -> None:
        state["seen"] = []

    async def is_completed(self, state: dict) -> bool:
        return bool(state["trajectory"]) and not state["trajectory"][-1]["completion"][-1].get("tool_calls")

    async def env_response(self, messages: list, state: dict) -> list:
        state["seen"] += [json.loads(call["function"]["arguments"])["x"] for call in messages[-1]["tool_calls"]]
        return [{"role": "tool", "content": f"seen {x}", "tool_call_id": "c"} for x in state["seen"][-2:]]

    async def score_rollout(self, state: dict) -> None:
        state["reward"] = float(state["answer"] in state["completion"][-1]["content"])
        state["metrics"] = {"seen": float(len(state["seen"])), "text": "no number"}

    def get_dataset(self, n: int) -> list:
        return [
            {"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i), "info": {"a": 1}} for i in range(4)
        ][:n]


def test_verifiers_environments_through_the_adapter() -> None:
    """Against a minimal world with the protocol; the real package was tried by hand (docs/experiments.md)."""
    from winnow.rewards.environments_verifiers import VerifiersEnvironment, verifiers_tasks

    tasks = verifiers_tasks("w", 3, world=World())
    assert [t.answer for t in tasks] == ["0", "1", "2"] and tasks[0].metadata["row"]["info"] == {"a": 1}
    for task, reward in ((tasks[2], 1.0), (tasks[1], 0.0)):
        environment = VerifiersEnvironment(World)
        environment.reset(task)
        step = environment.step(call_text("f", x=1) + call_text("f", x=2))
        assert [m["content"] for m in step.messages] == ["seen 1", "seen 2"] and not step.done
        step = environment.step("<tool_call>{")
        assert step.messages[0]["content"].startswith("error:") and not step.done
        assert environment.step("so it is 2").done
        assert environment.state() == {"reward": reward, "parts": {"seen": 2.0}}
    with pytest.raises(ValueError, match=r"needs the package verifiers|cannot load environment"):
        make_environment("verifiers:nothing").reset(tasks[0])


# ------------------------------------------------------------------------------------------------------------------------- tools


def test_calls_are_parsed_in_order_and_named_when_wrong() -> None:
    reply = f"thinking {call_text('a', x=1)} and {call_text('b')} <tool_call>nonsense</tool_call><tool_call>"
    calls = parse_calls(reply)
    assert (
        calls[:2] == [("a", {"x": 1}), ("b", {})]
        and all(isinstance(c, ToolError) for c in calls[2:])
        and len(calls) == 4
    )
    assert parse_calls("I would call <b>it</b> 4") == []
    [only] = parse_calls('<tool_call>{"name": "a", "arguments": "{\\"x\\": 2}"}')
    assert only == ("a", {"x": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs the argument 'n'"),
        ({"n": "3"}, "must be of type integer"),
        ({"n": True}, "must be of type integer"),
        ({"n": 0}, "at least 1"),
        ({"n": 10}, "at most 9"),
        ({"n": 1, "m": 2}, "has no argument 'm'"),
        ({"n": 1, "city": "Paris"}, "must be one of"),
        ({"n": 1, "tags": ["a", 1]}, r"tags'\[1\]"),
        ({"n": None}, "type integer"),
    ],
)
def test_schemas_are_kept_to(arguments: dict, message: str) -> None:
    one = tool(
        "t", "", str, n={"type": "integer", "minimum": 1, "maximum": 9}, city={"enum": ["Rome"], "default": "Rome"},
        tags={"type": "array", "items": {"type": "string"}, "default": []},
    )  # fmt: skip
    with pytest.raises(ToolError, match=message):
        check_arguments(one.parameters, arguments, "t")
    assert check_arguments(one.parameters, {"n": 3}, "t") == {"n": 3, "city": "Rome", "tags": []}


class Fragile(Toolbox):
    max_calls = 4
    max_chars = 10

    def tools(self) -> Any:
        return (tool("long", "", lambda: "x" * 50), tool("broken", "", lambda: {}["nothing"]))

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        return 1.0, {}


def test_budgets_and_our_own_faults() -> None:
    task = Task(id="t", domain="d", messages=({"role": "user", "content": "?"},), reward="environment", environment="x")
    environment = Fragile()
    environment.reset(task)
    step = environment.step(call_text("long") * 6)
    assert len(step.messages) == 5 and "limit of 4 calls" in step.messages[-1]["content"] and step.done
    assert step.messages[0]["content"] == "x" * 10 + " ... (50 characters in all)"
    environment.reset(task)
    assert environment.step(call_text("broken")).done and "reward" not in environment.state()
    trajectory = play(environment_tasks("files", 1, 1)[0], lambda _: "")
    object.__setattr__(trajectory, "environment_state", environment.state())
    failure = get_reward("environment")(task, trajectory)
    assert isinstance(failure, Failure) and failure.kind == "environment" and "KeyError" in failure.detail


@pytest.mark.parametrize(
    "statement",
    [
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
        "SELECT zeroblob(1000000000)",
        "ATTACH DATABASE '/tmp/x.db' AS other",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "SELEC 1",
        "SELECT writefile('x', 'y')",
        "VACUUM INTO '/tmp/winnow-escape.db'",
        "\0",
    ],
)
def test_statements_are_bounded_and_stay_inside(statement: str) -> None:
    connection = open_database("CREATE TABLE t(a); INSERT INTO t VALUES (1);")
    with pytest.raises(ToolError):
        run(connection, statement)
    assert run(connection, "SELECT a FROM t") == (["a"], [(1,)])


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "inbox/../../..", "a\0b"])
def test_files_stay_in_their_folder(path: str) -> None:
    task = environment_tasks("files", 1, 1)[0]
    environment = make_environment("files")
    environment.reset(task)
    for call in (call_text("read_file", path=path), call_text("write_file", path=path, text="x")):
        assert environment.step(call).messages[0]["content"].startswith("error:")


# ---------------------------------------------------------------------------------------------------------------- the multi-turn loop

START, END = 1, 2


class Characters:
    """A tokenizer of single characters, with a template that marks turns."""

    chat_template, eos_token_id, all_special_ids = "characters", END, (START, END)

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool) -> str:
        turns = "".join(f"\x01{m['role']}\n{m['content']}\x02\n" for m in messages)
        return turns + ("\x01assistant\n" if add_generation_prompt else "")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i in (START, END)))


class Chatter:
    """Stands for the engine: every turn of a sample is one reply of a random, malformed or expert agent, cut by the token budgets."""

    records, index_k, layers, record_dtype, expert_layers, has_work = False, 0, (), np.int32, (), True

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.runner: Any = None
        self.rngs: dict[Sequence, Random] = {}

    def add(
        self, prompt: list, sampling: Sampling, n: int, name: str, total: int | None, first_sample: int
    ) -> list[Sequence]:
        total = total or 10**6
        sequence = Sequence(
            tokens=list(prompt), order=0, sampling=sampling, stream=0, total_limit=total, limit=min(total, len(prompt) + sampling.max_tokens),
            turn_start=len(prompt), logprobs=[0.0] * len(prompt), versions=[-1] * len(prompt),
        )  # fmt: skip
        self.rngs[sequence] = Random(f"{name}/{first_sample}/{sampling.seed}")
        self.running.append(sequence)
        return [sequence]

    def extend(self, sequence: Sequence, tokens: list) -> None:
        assert len(tokens) < sequence.room
        sequence.tokens += tokens
        sequence.logprobs += [0.0] * len(tokens)
        sequence.versions += [-1] * len(tokens)
        sequence.turn_start, sequence.finish = len(sequence.tokens), None
        sequence.limit = min(sequence.total_limit, len(sequence.tokens) + sequence.sampling.max_tokens)
        self.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        self.rngs.pop(sequence, None)

    def step(self) -> list[Sequence]:
        ended, self.running = self.running, []
        for sequence in ended:
            episode, rng = self.runner._episodes[sequence], self.rngs[sequence]
            task = episode.job.request.task
            agent = rng.choice(
                [random_agent(task, rng, 0.1), malformed_agent(task, rng), expert(task), lambda _: "so\u20ac <tool_"]
            )
            try:
                reply = agent(episode.messages)
            except (LookupError, StopIteration):  # an expert in the middle of somebody else's episode
                reply = "no idea"
            drawn = [*map(ord, reply), END][: sequence.limit - len(sequence.tokens)]
            sequence.tokens += drawn
            sequence.logprobs += [-0.5] * len(drawn)
            sequence.versions += [0] * len(drawn)
            sequence.finish = "stop" if sequence.tokens[-1] == END else "length"
        return ended


def run_episodes(seed: int, count: int) -> list:
    engine, template = Chatter(), ChatTemplate(Characters())
    runner = EpisodeRunner(engine, template, make_environment)  # type: ignore[arg-type]
    engine.runner = runner
    rng = Random(seed)
    tasks = [task for kind in QUICK for level in LEVELS for task in environment_tasks(kind, level, 8, seed)]
    requests = []
    for number in range(count // 2):
        sampling = Sampling(max_tokens=rng.choice((60, 4000, 4000)), seed=seed)
        total = rng.choice((None, 4000, 8000))
        requests.append(
            Request(request_id=f"r{number}", task=rng.choice(tasks), num_samples=2, sampling=sampling, max_turns=rng.randint(2, 10),
                    max_total_tokens=total)
        )  # fmt: skip
    groups = {group.request.request_id: group for group in runner.run(requests)}
    return [(groups[r.request_id].request, t) for r in requests for t in groups[r.request_id].trajectories]


def test_masks_and_prefixes_hold_in_a_thousand_random_episodes() -> None:
    """What was drawn is masked in and nothing else; each turn only appends; budgets hold; the tokens are the template's own text."""
    episodes = run_episodes(0, 1000)
    characters = Characters()
    turns, reasons, failures = 0, set(), 0
    for request, trajectory in episodes:
        tokens, mask = trajectory.tokens.tolist(), trajectory.loss_mask
        turns += trajectory.turns
        reasons.add(trajectory.finish_reason)
        failures += "failure" in trajectory.environment_state
        assert trajectory.turns <= request.max_turns and len(tokens) <= (request.max_total_tokens or 10**6)
        prompt = characters.apply_chat_template(list(request.task.messages), False, True)
        assert characters.decode(tokens[: len(prompt)]) == prompt and not mask[: len(prompt)].any()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        replies = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
        assert [characters.decode(tokens[a:b], True) for a, b in runs] == replies and len(runs) == trajectory.turns
        assert all(b - a <= request.sampling.max_tokens for a, b in runs) and mask[-1]
        assert (trajectory.policy_versions[mask] == 0).all() and (trajectory.policy_versions[~mask] == -1).all()
        assert (trajectory.rollout_logprobs[~mask] == 0).all() and (trajectory.rollout_logprobs[mask] < 0).all()
        text = characters.apply_chat_template([dict(m) for m in trajectory.messages], False, False)
        assert text.startswith(characters.decode(tokens)), (
            "the tokens are what the template makes of the whole conversation"
        )
        for (_, end), (start, _) in pairwise(runs):
            between = characters.decode(tokens[end:start])
            assert (
                "\x01tool\n" in between and between.endswith("\x01assistant\n") and between.count("\x01assistant") == 1
            )
    assert len(episodes) == 1000 and turns > 1500 and reasons == {"stop", "done", "length"} and failures == 0


def test_the_same_seed_gives_the_same_episodes_token_by_token() -> None:
    first, second = run_episodes(7, 60), run_episodes(7, 60)
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.environment_state == b.environment_state
    assert any(
        a.tokens.tolist() != b.tokens.tolist() for (_, a), (_, b) in zip(first, run_episodes(8, 60), strict=True)
    )
