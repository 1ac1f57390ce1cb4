"""A generative judge: a language model is asked yes or no about a reply, and its probabilities of the two words are the verdict.

    rubric questions ─ judge prompt ─> tokens + each spelling of yes and no ─ score ─> log-probabilities ─> p(yes | yes or no)

`score` is the engine's own method (`LocalPool.score`, `Pool.score`): the judge is whatever model runs there, the policy itself or another
checkpoint. A judge that cannot be asked, or that says something else than yes or no, is a Failure of its sample, never a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from winnow.rewards.alignment import criteria_of, questions_of, weigh
from winnow.rollout.schema import Failure, Score, Task, Trajectory
from winnow.rollout.template import ChatTemplate

ScoreTokens = Callable[[Sequence[Sequence[int]]], Sequence[np.ndarray]]

PROMPT = """You judge a reply by one criterion. Answer with one word, Yes or No.

[Request]
{request}

[Reply]
{reply}

[Criterion]
{question}

Does the reply meet the criterion? Answer Yes or No."""
YES, NO = ("Yes", "yes"), ("No", "no")
MIN_MASS = 1e-3  # what yes and no must have together: less, and the judge has not understood
MAX_CHARS = 20_000  # of a reply; its middle is left out beyond that
DETAIL = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """p(yes) among yes and no, and what both have of all that the judge might say."""

    yes: float
    mass: float


class Judge:
    """Asks one model. `score`: fp32 log-probabilities of every token given those before it; `name` is for messages and metrics."""

    def __init__(self, score: ScoreTokens, tokenizer: Any, name: str = "judge", min_mass: float = MIN_MASS) -> None:
        self.score, self.name, self.min_mass = score, name, min_mass
        self.template = ChatTemplate(tokenizer)
        self.words = [list(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (*YES, *NO)]
        if any(not word for word in self.words):
            raise ValueError(f"judge {name!r}: its tokenizer makes no token of yes or no, so it cannot be asked")

    def ask(self, task: Task, reply: str, questions: Sequence[str]) -> list[Verdict | Failure]:
        """One verdict or Failure a question."""
        prompts = [self.prompt(task, reply, question) for question in questions]
        sequences = [[*prompt, *word] for prompt in prompts for word in self.words]
        try:
            logprobs = list(self.score(sequences))
        except Exception as error:
            failure = Failure(kind="judge", detail=f"{self.name}: {type(error).__name__}: {error}"[:DETAIL])
            return [failure] * len(questions)
        if len(logprobs) != len(sequences):
            raise ValueError(f"judge {self.name!r}: {len(logprobs)} results for {len(sequences)} sequences")
        size = len(self.words)
        return [self.verdict(logprobs[size * i : size * (i + 1)]) for i in range(len(questions))]

    def prompt(self, task: Task, reply: str, question: str) -> list[int]:
        if len(reply) > MAX_CHARS:
            half = MAX_CHARS // 2
            reply = f"{reply[:half]}\n[...]\n{reply[-half:]}"
        request = "\n".join(m["content"] for m in task.messages if m["role"] == "user")
        text = PROMPT.format(request=request, reply=reply, question=question)
        return self.template.prompt_ids([{"role": "user", "content": text}])

    def verdict(self, logprobs: Sequence[np.ndarray]) -> Verdict | Failure:
        """From the scored sequences of one question, in the order of `self.words`."""
        sums = [float(np.sum(row[-len(word) :])) for row, word in zip(logprobs, self.words, strict=True)]
        spelled = {
            tuple(word): np.exp(total) for word, total in zip(self.words, sums, strict=True)
        }  # equal spellings once
        yes = float(sum(spelled[key] for key in {tuple(word) for word in self.words[: len(YES)]}))
        no = float(sum(spelled[key] for key in {tuple(word) for word in self.words[len(YES) :]}))
        mass = yes + no
        if not np.isfinite(mass) or mass < self.min_mass:
            return Failure(
                kind="judge",
                detail=f"{self.name} gives yes and no together {mass:.1e}: it does not answer the question",
            )
        return Verdict(yes=yes / mass, mass=mass)


class JudgedRubric:
    """Reward `rubric` with a judge for its questions; programmatic criteria as ever. In place of the registry's where a judge is set."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure:
        questions = questions_of(task)
        verdicts = self.judge.ask(task, trajectory.reply, questions) if questions else []
        failed = next((verdict for verdict in verdicts if isinstance(verdict, Failure)), None)
        if failed is not None:
            return failed
        return weigh(task, trajectory.reply, [v.yes for v in verdicts if isinstance(v, Verdict)])


def held_out_check(
    judge: Judge, graded: Sequence[tuple[Task, Trajectory, Score | Failure]], limit: int = 32
) -> dict[str, float]:
    """How a second, stronger judge sees what the first one rewarded: the sign of a policy that games its judge.

    `gap`: the training judge's mean minus the held-out one's, on the same questions; `agreement`: share of verdicts on the same side of
    one half; `count`: verdicts compared; `failures`: those that the held-out judge did not give. Empty where no rubric asks questions.
    """
    first: list[float] = []
    second: list[float] = []
    failures = 0
    for task, trajectory, score in graded[:limit]:
        if isinstance(score, Failure) or not task.metadata.get("rubric") or not questions_of(task):
            continue
        names = [
            part for part, criterion in zip(score.parts, criteria_of(task), strict=False) if "question" in criterion
        ]
        for name, verdict in zip(names, judge.ask(task, trajectory.reply, questions_of(task)), strict=True):
            if isinstance(verdict, Failure):
                failures += 1
            else:
                first.append(score.parts[name])
                second.append(verdict.yes)
    if not first and not failures:
        return {}
    if not first:
        return {"count": 0.0, "failures": float(failures)}
    a, b = np.array(first), np.array(second)
    return {
        "gap": float(np.mean(a - b)),
        "agreement": float(np.mean((a > 0.5) == (b > 0.5))),
        "count": float(len(a)),
        "failures": float(failures),
    }
