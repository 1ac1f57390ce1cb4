"""Conversations: tokens in, tokens out, over several turns and samples at once."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from winnow.models import attach as A
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.rollout import records
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.episode import EpisodeRunner, cut_after
from winnow.rollout.schema import Request, Sampling, Step, Task
from winnow.rollout.template import ChatTemplate

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TOP_K = 8
TALKATIVE = {
    "stop": tuple("abcdefghijklmnopqrstuvwxyzABCDEFGH"),
    "max_tokens": 40,
}  # turns that end soon, in a stop text


def make_tokenizer(template=TEMPLATE, eos="<|end|>"):
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {text: i for i, text in enumerate(["<|pad|>", "<|start|>", "<|end|>", "<|unk|>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token="<|pad|>", additional_special_tokens=["<|start|>", "<|end|>"]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    return make_tokenizer()


def make_engine(tokenizer, **changes):
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=400, initializer_range=0.2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = A.attach(LlamaForCausalLM(shape).eval(), IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=16, rope_dim=8))
    config = EngineConfig(
        **{"page_size": 8, "num_pages": 300, "max_batch": 6, "prefill_chunk": 64, "record_indices": True, **changes}
    )
    return Engine(model, tokenizer, config)


class Counter:
    """Asks for more until it has seen `turns` replies; in all it says where it is."""

    def __init__(self, turns):
        self.turns, self.seen = turns, []

    def reset(self, task):
        return ({"role": "system", "content": "begin"},)

    def step(self, reply):
        self.seen.append(reply)
        if reply == "crash":
            raise KeyError("no such tool")
        return Step(messages=({"role": "tool", "content": f"obs {len(self.seen)}"},), done=len(self.seen) >= self.turns)

    def state(self):
        return {"seen": list(self.seen)}


def task(environment=None, text="hello there"):
    return Task(id="t", domain="d", messages=({"role": "user", "content": text},), reward="r", environment=environment)


def request(name="r", samples=3, environment=None, turns=1, **changes):
    sampling = Sampling(**{"max_tokens": 9, "temperature": 1.0, "top_k": 40, "seed": 1, **changes.pop("sampling", {})})
    return Request(
        request_id=name, task=task(environment), num_samples=samples, sampling=sampling, max_turns=turns, **changes
    )


def runner_for(tokenizer, make=None, **changes):
    return EpisodeRunner(make_engine(tokenizer, **changes), ChatTemplate(tokenizer), make)


def check(trajectory, engine):
    """What must hold of every trajectory: log-probabilities and index sets equal the learner's, masks fit."""
    tokens, mask = trajectory.tokens, trajectory.loss_mask
    again = {}
    with torch.no_grad():
        hidden = hidden_states(
            engine.model, torch.tensor(tokens).long(), train_context([len(tokens)], selection_out=again)
        )
        logits = (hidden @ lm_head_weight(engine.model).T) / trajectory.temperature
    for t in np.flatnonzero(mask):
        row = logits[t - 1]
        if trajectory.kept_sets is not None:
            low, high = trajectory.kept_sets.indptr[t : t + 2]
            kept = torch.from_numpy(trajectory.kept_sets.token_ids[low:high]).long()
            assert high - low >= 40 and int(tokens[t]) in kept.tolist()
            row = torch.full_like(row, -torch.inf).scatter(0, kept, row[kept])
        assert abs(float(row.log_softmax(0)[int(tokens[t])]) - trajectory.rollout_logprobs[t]) < 1e-4
    assert (trajectory.policy_versions[mask] == 0).all() and (trajectory.policy_versions[~mask] == -1).all()
    assert (trajectory.rollout_logprobs[~mask] == 0).all() and mask[-1]
    sets = records.decode([trajectory.index_record], [len(tokens)])
    for layer in (0, 1):
        assert torch.equal(sets[layer].indices[:-1], again[layer].indices[:-1])


def test_turns_append_observations_and_mask_them(tokenizer):
    runner = runner_for(tokenizer, lambda name: Counter(int(name)))
    [group] = runner.run([request(environment="3", turns=5, sampling=TALKATIVE)])
    assert len(group.trajectories) == 3 and not runner.engine.scheduler.live
    assert runner.engine.cache.num_free == runner.engine.cache.num_pages
    for number, trajectory in enumerate(group.trajectories):
        assert (trajectory.sample, trajectory.turns, trajectory.finish_reason) == (number, 3, "done")
        check(trajectory, runner.engine)
        assert [m["role"] for m in trajectory.messages[:3]] == ["user", "system", "assistant"]
        # the generated runs, decoded, are the replies; everything else is what the template puts around them
        bounds = np.flatnonzero(np.diff(np.concatenate([[0], trajectory.loss_mask.astype(int), [0]])))
        pieces = [trajectory.tokens[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
        replies = [m["content"] for m in trajectory.messages if m["role"] == "assistant"]
        assert (
            [tokenizer.decode(p, skip_special_tokens=True) for p in pieces]
            == replies
            == trajectory.environment_state["seen"]
        )
        assert trajectory.reply == replies[-1]


def test_a_conversation_renders_as_its_tokens(tokenizer):
    """With replies that end in the end mark, the whole of it is what the template would have rendered at once."""
    engine, template = make_engine(tokenizer), ChatTemplate(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert template.end_ids == {end}
    runner = EpisodeRunner(engine, template, lambda name: Counter(4))
    plain = engine.forward.logits

    def favour_the_end(hidden):
        logits = plain(hidden).index_fill(1, torch.tensor([0, 1, 3]), -torch.inf)
        logits[:, end] += 3
        return logits

    engine.forward.logits = favour_the_end
    long = request(
        samples=6,
        environment="4",
        turns=4,
        sampling={"max_tokens": 60, "top_k": 0, "temperature": 1.5},
        max_total_tokens=390,
    )
    [group] = runner.run([long])
    whole = [t for t in group.trajectories if t.finish_reason == "done" and t.tokens[-1] == end]
    for trajectory in whole:
        assert trajectory.turns == 4
        text = tokenizer.apply_chat_template([dict(m) for m in trajectory.messages], tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"][:-1] == trajectory.tokens.tolist()
    assert len(whole) >= 2, [t.finish_reason for t in group.trajectories]


def test_observation_ids_after_each_kind_of_ending(tokenizer):
    template = ChatTemplate(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    observation = [{"role": "tool", "content": "o"}]
    full = template.observation_ids(messages, observation)
    assert tokenizer.decode(full) == "<|end|>\n<|start|>tool\no<|end|>\n<|start|>assistant\n"
    assert template.observation_ids(messages, observation, end) == full[1:]
    assert template.prompt_ids(messages[:1]) == tokenizer("<|start|>user\nq<|end|>\n<|start|>assistant\n")["input_ids"]
    with pytest.raises(ValueError, match="follow an assistant's reply"):
        template.observation_ids(messages[:1], observation)
    forgets = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        ChatTemplate(make_tokenizer(forgets)).observation_ids(messages, observation)
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate(make_tokenizer(None))
    base = make_tokenizer(eos="<|pad|>")  # whose eos is not what the template ends a turn with
    assert ChatTemplate(base).end_ids == {base.eos_token_id, end}


def test_groups_do_not_depend_on_what_runs_beside_them(tokenizer):
    def make(name):
        return Counter(int(name))

    mixed = runner_for(tokenizer, make)
    requests = [
        request("a", 4, "2", 3, sampling=TALKATIVE),
        request("b", 2),
        request("c", 3, "3", 2, sampling=TALKATIVE),
    ]
    together = {group.request.request_id: group for group in mixed.run(requests)}
    for one in requests:
        [alone] = runner_for(tokenizer, make, max_batch=2, prefill_chunk=16).run([one])
        for left, right in zip(alone.trajectories, together[one.request_id].trajectories, strict=True):
            assert left.tokens.tolist() == right.tokens.tolist()
    assert {(t.turns, t.finish_reason) for t in together["c"].trajectories} == {(2, "stop")}
    assert {(t.turns, t.finish_reason) for t in together["a"].trajectories} == {(2, "done")}


def test_samples_that_begin_differently_have_prompts_of_their_own(tokenizer):
    """A task is tokenised once for samples that begin alike; an environment may deal each another beginning, even in the same dict."""
    beginning = {"role": "system", "content": ""}

    class Dealer(Counter):
        def reset(self, task):
            beginning["content"] = "abcab"[len(dealt)]
            dealt.append(beginning["content"])
            return (beginning,)

    dealt = []
    [group] = runner_for(tokenizer, lambda name: Dealer(1)).run([request(samples=5, environment="dealer")])
    template = ChatTemplate(tokenizer)
    for trajectory, begun in zip(group.trajectories, dealt, strict=True):
        user = {"role": "user", "content": "hello there"}
        want = template.prompt_ids([user, {"role": "system", "content": begun}])
        assert trajectory.tokens[: len(want)].tolist() == want
    assert len({tuple(t.tokens[~t.loss_mask].tolist()) for t in group.trajectories}) == 3


def test_budgets(tokenizer):
    runner = runner_for(tokenizer, lambda name: Counter(99))
    prompt = len(runner.template.prompt_ids([*task().messages, {"role": "system", "content": "begin"}]))
    [group] = runner.run([request(environment="x", turns=9, max_total_tokens=prompt + 5)])
    assert all(len(t.tokens) <= prompt + 5 for t in group.trajectories)
    assert {t.finish_reason for t in group.trajectories} <= {"length"}
    # room for the reply, none for the observation
    stop = {"stop": tuple(chr(i) for i in range(32, 127)), "max_tokens": 50}
    [group] = runner.run([request("s", environment="x", turns=9, max_total_tokens=prompt + 20, sampling=stop)])
    assert all(t.turns == 1 and t.finish_reason == "length" and t.num_generated < 20 for t in group.trajectories)


def test_slow_environments_answer_in_threads_and_hold_nobody_up(tokenizer):
    """The samples of a slow environment wait together, an ordinary request ends meanwhile, and the episodes are those of a fast one."""
    import threading
    import time

    met = threading.Barrier(3, timeout=30)  # passes only when all three samples wait at the same time

    class Slow(Counter):
        slow = True

        def step(self, reply):
            if not self.seen:
                met.wait()
                time.sleep(0.2)
            return super().step(reply)

    wanted = [request("s", 3, "2", 3, sampling=TALKATIVE), request("q", 2)]
    runner = runner_for(tokenizer, lambda name: Slow(2))
    order = [group.request.request_id for group in runner.run(wanted)]
    assert order == ["q", "s"]
    slow = {group.request.request_id: group for group in runner_for(tokenizer, lambda name: Slow(2)).run(wanted)}
    fast = {group.request.request_id: group for group in runner_for(tokenizer, lambda name: Counter(2)).run(wanted)}
    for name in ("s", "q"):
        for left, right in zip(slow[name].trajectories, fast[name].trajectories, strict=True):
            assert left.tokens.tolist() == right.tokens.tolist() and left.turns == right.turns
    assert not runner.engine.scheduler.live and not runner._answering


def test_stop_texts_stay_in_the_reply():
    assert cut_after("abc</x>def</x>", ("</y>", "</x>")) == "abc</x>" and cut_after("abc", ("z",)) == "abc"


def test_failures_touch_only_their_own_request(tokenizer):
    class Broken(Counter):
        def step(self, reply):
            raise KeyError("no such tool")

    runner = runner_for(tokenizer, lambda name: Broken(1) if name == "bad" else Counter(1))
    runner.add(request("bad", 2, "bad"))
    runner.add(request("fine", 2, "good"))
    with pytest.raises(ValueError, match="'fine' is already running"):
        runner.add(request("fine"))
    with pytest.raises(ValueError, match="max_total_tokens is 5"):
        runner.add(request("long", max_total_tokens=5))
    results = {}
    while runner.has_work:
        results |= dict(runner.step())
    assert set(results) == {"bad", "fine"} and [len(group.trajectories) for group in results.values()] == [2, 2]
    for trajectory in results["bad"].trajectories:  # a sample lost, not the run
        assert trajectory.finish_reason == "done" and trajectory.turns == 1
        assert trajectory.environment_state["failure"] == {
            "kind": "environment",
            "detail": "Broken: KeyError: 'no such tool'",
        }
    assert all("failure" not in trajectory.environment_state for trajectory in results["fine"].trajectories)
    assert not runner.engine.scheduler.live and runner.engine.cache.num_free == 300
    with pytest.raises(ValueError, match="built without environments"):
        runner_for(tokenizer).run([request(environment="x")])
    with pytest.raises(ValueError, match="must be >= 1"):
        runner.run([request(samples=0)])
