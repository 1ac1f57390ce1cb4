"""Ray workers that die, hang and refuse; and the same requests without Ray."""

import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from winnow.models.attach import attach
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rollout.engine import EngineConfig
from winnow.rollout.local_pool import LocalPool
from winnow.rollout.pool import Pool, PoolLimits
from winnow.rollout.schema import Group, Request, Sampling, Task, Trajectory
from winnow.rollout.weights import WeightError, pack
from winnow.rollout.worker import RolloutWorker, WorkerSpec

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT / ".types"), os.environ.get("PYTHONPATH", "")])
OPTIONS = {"runtime_env": {"env_vars": {"PYTHONPATH": PATHS}}}
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    letters = {text: i for i, text in enumerate(["<|end|>", "<|unk|>", *(chr(i) for i in range(97, 123)), " "])}
    inner = Tokenizer(models.WordLevel(letters, unk_token="<|unk|>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", unk_token="<|unk|>")
    tokenizer.chat_template = TEMPLATE
    shape = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = attach(LlamaForCausalLM(shape), IndexerConfig(top_k=8, num_heads=2, head_dim=16, rope_dim=8))
    return str(save(model, tokenizer, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(num_cpus=4, include_dashboard=False, address="local", logging_level=logging.ERROR, log_to_driver=False)
        yield ray
        ray.shutdown()


def spec_of(folder):
    return WorkerSpec(model=folder, engine=EngineConfig(page_size=8, num_pages=200, max_batch=8, record_indices=True))


def request_of(name, text="hello there", samples=2, **sampling):
    task = Task(id=name, domain="d", messages=({"role": "user", "content": text},), reward="r")
    return Request(
        request_id=name, task=task, num_samples=samples, sampling=Sampling(**{"max_tokens": 12, "seed": 2, **sampling})
    )


def fake_worker_class():
    """A local class: it travels by value, so that its workers need not import this file, nor torch, and start fast."""

    def stamped(request, version):
        """A trajectory that says who made it: the process in its tokens, the weights in its versions."""
        made = np.array([os.getpid()], dtype=np.int32)
        return Trajectory(
            request_id=request.request_id, sample=request.first_sample, task_id="t", domain="d", tokens=made, loss_mask=made > 0,
            rollout_logprobs=np.zeros(1, np.float32), policy_versions=made * 0 + version, finish_reason="stop", messages=(),
        )  # fmt: skip

    class FakeWorker:
        """Answers without a model; the text of a request says how: fine, slow, suicide:FILE (once), always-dies, wrong, broken."""

        def __init__(self, spec, number, driver_version):
            if spec.model == "broken":
                raise ValueError("no such model")
            kind, _, left = spec.model.partition(":")  # "killed:FOLDER:N": the first N processes die before they are up
            if kind == "killed":
                place, _, times = left.rpartition(":")
                starts = len(os.listdir(place))
                open(os.path.join(place, str(os.getpid())), "w").close()
                if starts < int(times):
                    os.kill(os.getpid(), signal.SIGKILL)
            self.number, self.version = number, 0
            self.tasks, self.ended = [], asyncio.Queue()

        async def start(self, request, tickets):
            for sample, ticket in tickets.items():
                part = replace(request, num_samples=1, first_sample=sample)
                self.tasks.append(asyncio.create_task(self.answer(part, ticket)))

        async def answer(self, part, ticket):
            try:
                outcome = (await self.generate([part]))[0].trajectories
            except Exception as error:
                outcome = error
            await self.ended.put((ticket, outcome))

        async def finished(self):
            first = await self.ended.get()
            return [first, *(self.ended.get_nowait() for _ in range(self.ended.qsize()))]

        async def ping(self):
            log = os.path.realpath("/proc/self/fd/2")
            return {"worker": self.number, "pid": os.getpid(), "host": "here", "version": self.version, "log": log}

        ready = ping

        async def score(self, sequences, temperature):
            """The process that answers. A text is a file's name; one that is not there costs the life of the first to read it."""
            for text in sequences:
                if text == "slow":
                    await asyncio.sleep(60)
                if not os.path.exists(text):
                    open(text, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
            return [os.getpid()] * len(sequences)

        async def generate(self, requests):
            groups = []
            for request in requests:
                word, _, rest = request.task.messages[0]["content"].partition(":")
                if word == "slow":
                    await asyncio.sleep(float(rest))
                elif word == "suicide" and not os.path.exists(rest):
                    open(rest, "w").close()
                    print("last words of this worker", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                elif word == "freeze" and not os.path.exists(rest):
                    open(rest, "w").close()
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif word == "full" and not os.path.exists(rest):
                    import ray

                    open(rest, "w").close()
                    raise ray.exceptions.ObjectStoreFullError("no room for the result")
                elif word == "always-dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif (
                    word == "partly"
                ):  # samples 0 and 1 at once; the others kill the worker that is the first to try them
                    key, version = request.key.replace("/", "."), self.version
                    open(os.path.join(rest, f"{key}.{os.getpid()}"), "w").close()
                    tried = len([name for name in os.listdir(rest) if name.startswith(f"{key}.")])
                    if request.first_sample > 1 and tried == 1:
                        while not os.path.exists(os.path.join(rest, "die")):
                            await asyncio.sleep(0.02)
                        os.kill(os.getpid(), signal.SIGKILL)
                    groups.append(Group(request=request, trajectories=(stamped(request, version),)))
                    continue
                elif word == "wrong":
                    raise ValueError(f"request {request.request_id!r} is wrong")
                elif word == "broken":
                    raise KeyError("broken")
                groups.append(Group(request=request, trajectories=()))
            return groups

        async def cancel(self, request_ids):
            pass

        async def load_weights(self, update):
            if update.version == 13:
                raise ValueError("tensor 'x' is bad")
            self.version = update.version
            return self.version

        async def stats(self):
            return {"version": self.version}

    return FakeWorker


FAST = PoolLimits(request_timeout_s=3.0, start_timeout_s=60.0)


def fake_pool(count, limits=FAST, model="fake", threads=1):
    spec = SimpleNamespace(model=model, threads=threads, engine=SimpleNamespace(max_batch=4))
    return Pool(spec, [OPTIONS] * count, limits=limits, worker_class=fake_worker_class())


def push(pool, version):
    import ray

    return pool.push_weights(ray.put(SimpleNamespace(version=version)), version)


def names(groups):
    return sorted(group.request.request_id for group in groups)


@pytest.fixture(scope="module")
def pool(ray_cluster):
    with fake_pool(2) as built:
        yield built


@pytest.fixture(autouse=True)
def settled(request):
    """Each test starts with all workers of the shared pool up."""
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool")._wait_ready()


def test_each_request_is_delivered_once_although_a_worker_is_killed(pool, tmp_path, caplog):
    texts = [f"slow:{0.02 * (i % 4)}" for i in range(20)]
    texts[7] = f"suicide:{tmp_path}/once"
    requests = [request_of(f"r{i}", text) for i, text in enumerate(texts)]
    with caplog.at_level(logging.INFO, logger="winnow.rollout"):
        got = names(pool.generate(requests))
    assert got == sorted(r.request_id for r in requests)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert (
        len(lines) == 1 and "rollout worker" in lines[0] and "pid" in lines[0] and "died while generating" in lines[0]
    )
    assert "The last lines of its log: " in lines[0] and "last words of this worker" in lines[0]
    assert "SIGKILL" in lines[0] or "killed" in lines[0].lower() or "unexpectedly" in lines[0]
    pool._wait_ready()  # and it is replaced while nobody asks


def test_a_replaced_worker_gets_the_current_weights(pool, tmp_path):
    assert push(pool, 5) == {0: 5, 1: 5}
    list(pool.generate([request_of("die", f"suicide:{tmp_path}/once")]))
    pool._wait_ready()
    assert {number: stats["version"] for number, stats in pool.stats().items()} == {0: 5, 1: 5}
    with pytest.raises(ValueError, match=r"rollout worker \d .* refused the update: tensor 'x' is bad"):
        push(pool, 13)
    assert set(push(pool, 6).values()) == {6}


def test_a_parity_check_outlives_the_worker_that_it_asks(pool, tmp_path):
    first = pool.score([str(tmp_path)])[0]
    other = pool.score([str(tmp_path / "missing")])[0]
    assert other != first and gone(first)
    pool._wait_ready()
    with pytest.raises(TimeoutError, match=r"rollout worker \d.* has not scored 1 texts within 3 s"):
        pool.score(["slow"])


def test_a_hung_worker_is_named_and_replaced(pool, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="winnow.rollout"):
        got = names(
            pool.generate(
                [request_of("f", f"freeze:{tmp_path}/once"), request_of("g", "slow:0.1"), request_of("h", "fine")]
            )
        )
    assert got == ["f", "g", "h"]
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "did not answer while generating 'f'" in line and "for 3 s" in line
    pid = int(line.split("pid ")[1].split()[0])
    assert gone(pid), "the stopped process is still there"
    pool._wait_ready()


def test_finished_samples_of_a_dead_worker_are_kept(ray_cluster, tmp_path, caplog):
    """kill -9 in the middle of a group: the samples that had come keep their process and version, only the others are made again."""
    with caplog.at_level(logging.WARNING, "winnow.rollout"), fake_pool(1) as pool:
        push(pool, 5)
        groups = pool.generate([request_of("p", f"partly:{tmp_path}", samples=4), request_of("q", "slow:0.1")])
        assert next(groups).request.request_id == "q"
        [job] = {sent.job for sent in pool._crew.workers[0].sent.values()}
        assert sorted(job.done) == [0, 1]
        push(pool, 6)  # the samples under way are not done when the weights change, nor when their process dies
        (tmp_path / "die").touch()
        [group] = groups
    first, second, third, fourth = group.trajectories
    assert [t.sample for t in group.trajectories] == [0, 1, 2, 3]
    assert first.tokens == second.tokens != third.tokens == fourth.tokens
    assert [int(t.policy_versions[0]) for t in group.trajectories] == [5, 5, 6, 6]
    made = sorted(path.name.split(".")[1] for path in tmp_path.iterdir() if path.name != "die")
    assert made == ["0", "1", "2", "2", "3", "3"]
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "died while generating" in line and "2 samples of 1 requests are sent again" in line
    assert gone(int(first.tokens[0])) and gone(int(third.tokens[0]))


def test_requests_that_cannot_succeed_raise_their_cause(pool):
    with pytest.raises(ValueError, match="request 'w' is wrong"):
        list(pool.generate([request_of("ok"), request_of("w", "wrong")]))
    with pytest.raises(RuntimeError, match=r"'b' failed on rollout worker .*attempt 3 of 3: KeyError\('broken'\)"):
        list(pool.generate([request_of("b", "broken")]))
    with pytest.raises(ValueError, match="'x' is used more than once"):
        pool.generate([request_of("x"), request_of("x")])
    assert names(pool.generate([request_of("w"), request_of("b"), request_of("x")])) == [
        "b",
        "w",
        "x",
    ]  # the ids are free again
    assert list(pool.generate([])) == []


def test_calls_run_side_by_side_and_can_be_dropped(pool):
    slow = pool.generate([request_of(f"s{i}", "slow:1") for i in range(12)])
    quick = pool.generate([request_of("q", "fine")])
    assert next(slow).request.request_id.startswith("s")
    slow.close()
    assert names(quick) == ["q"] and not pool._ledger.names
    assert names(pool.generate([request_of("s1")])) == ["s1"]


def test_a_worker_killed_before_it_is_up_is_named_and_started_again(ray_cluster, tmp_path, caplog):
    with caplog.at_level(logging.ERROR, "winnow.rollout"), fake_pool(1, model=f"killed:{tmp_path}:2") as pool:
        assert names(pool.generate([request_of("a")])) == ["a"]
    assert len(list(tmp_path.iterdir())) == 3
    assert caplog.text.count("rollout worker 0 (not up yet) died while starting") == 2


@pytest.mark.slow
def test_a_worker_killed_at_every_start_ends_the_pool_with_its_name(ray_cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"rollout worker 0 .*died while starting"):
        fake_pool(1, model=f"killed:{tmp_path}:99")
    assert len(list(tmp_path.iterdir())) == FAST.max_restarts


def test_a_request_that_kills_every_worker_is_given_up(ray_cluster):
    limits = PoolLimits(request_timeout_s=5.0, start_timeout_s=60.0, max_attempts=1)
    with (
        fake_pool(1, limits) as pool,
        pytest.raises(RuntimeError, match=r"'k' was lost, attempt 1 of 1: .*rollout worker 0"),
    ):
        list(pool.generate([request_of("k", "always-dies")]))
    with pytest.raises(RuntimeError, match="shut down"):
        pool.generate([request_of("z")])


def test_a_pool_that_cannot_start_says_why(ray_cluster):
    with pytest.raises(RuntimeError, match=r"rollout worker 0 .*no such model"):
        fake_pool(1, model="broken")
    with pytest.raises(
        TimeoutError, match=r"rollout worker 0 .* did not finish starting within 1 s; are there free CPUs"
    ):
        fake_pool(1, PoolLimits(start_timeout_s=1.0), threads=64)
    with pytest.raises(ValueError, match=r"rollout\.workers is 0"):
        fake_pool(0)


def test_a_pool_of_one_goes_on_after_a_kill_a_freeze_and_a_full_store(ray_cluster, tmp_path, caplog):
    limits = PoolLimits(request_timeout_s=60.0, start_timeout_s=60.0, ping_timeout_s=3.0)
    texts = ["fine", f"suicide:{tmp_path}/a", f"freeze:{tmp_path}/b", "slow:0.1"]
    with caplog.at_level(logging.WARNING, "winnow.rollout"), fake_pool(1, limits) as pool:
        requests = [request_of(f"r{i}", text) for i, text in enumerate(texts)]
        assert names(pool.generate(requests)) == [r.request_id for r in requests]
        assert names(pool.generate([request_of("full", f"full:{tmp_path}/c")])) == ["full"]
        assert not pool._ledger.names and not pool._ledger.line and not pool._ledger._calls
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 2 and "died while generating" in errors[0]
    assert (
        "did not answer a ping while generating" in errors[1]
    )  # named by its heartbeat, long before the request's own limit
    assert "no room for the result" in caplog.text
    assert all(gone(int(line.split("pid ")[1].split()[0])) for line in errors)


def gone(pid, within_s=20.0):
    """Whether the process has ended by then; a zombie has."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_weights_that_do_not_fit_the_store_are_named_and_the_old_ones_stay(pool, monkeypatch):
    import ray

    before = pool.stats()

    def full(value):
        raise ray.exceptions.ObjectStoreFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", full)
        with pytest.raises(RuntimeError, match=r"weights of version 9 \(.* GB\) do not fit into Ray's object store"):
            pool.push_weights(pack({"x": torch.zeros(3)}, 9))
    assert pool.stats() == before and names(pool.generate([request_of("after")])) == ["after"]


@pytest.mark.slow
def test_a_soak_of_2000_prompts_with_random_kills_loses_none(ray_cluster):
    rng = np.random.default_rng(0)
    limits = PoolLimits(request_timeout_s=30.0, start_timeout_s=120.0, max_attempts=20, max_restarts=10)
    pids = set()
    with fake_pool(4, limits) as pool:
        requests = [request_of(f"r{i}", f"slow:{0.02 * (i % 5)}", samples=1) for i in range(2000)]
        got = []
        for group in pool.generate(requests):
            got.append(group.request.request_id)
            alive = [int(text.split("pid ")[1].split()[0]) for text in pool.describe().values() if "pid " in text]
            pids |= set(alive)
            if len(got) % 100 == 0 and alive:
                os.kill(int(rng.choice(alive)), rng.choice([signal.SIGKILL, signal.SIGTERM]))
            if len(got) % 500 == 0:
                assert set(push(pool, len(got)).values()) == {len(got)}
        assert sorted(got) == sorted(r.request_id for r in requests) and len(set(got)) == 2000
        pool._wait_ready()
        assert {stats["version"] for stats in pool.stats().values()} == {2000}
    assert len(pids) >= 20 and all(gone(pid) for pid in pids)


def test_ray_and_local_agree_and_survive_a_kill(ray_cluster, folder):
    requests = [request_of(f"r{i}", "abc " * (3 + i), samples=3) for i in range(6)]
    local = LocalPool(spec_of(folder))
    want = {group.request.request_id: group for group in local.generate(requests)}
    other = load(folder)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.mul_(1.1)
    update = pack(other.state_dict(), 3)
    with Pool(spec_of(folder), [OPTIONS] * 2, timeout_s=120, limits=PoolLimits(start_timeout_s=240)) as pool:
        got = {}
        for group in pool.generate(requests):
            assert group.request.request_id not in got
            got[group.request.request_id] = group
            if len(got) == 1:
                os.kill(int(pool.describe()[1].split("pid ")[1].split()[0]), signal.SIGKILL)
        same(want, got)
        assert set(pool.push_weights(update).values()) == {3} and local.push_weights(update) == {0: 3}
        want = {group.request.request_id: group for group in local.generate(requests)}
        got = {group.request.request_id: group for group in pool.generate(requests)}
        same(want, got)
        assert {int(v) for g in got.values() for t in g.trajectories for v in t.policy_versions} == {-1, 3}
        sample = got["r0"].trajectories[0]
        scored = pool.score([sample.tokens.tolist()])[0]
        np.testing.assert_allclose(scored[sample.loss_mask], sample.rollout_logprobs[sample.loss_mask], atol=1e-4)
        wide = {**dict(other.state_dict()), "model.norm.weight": torch.ones(33)}
        with pytest.raises(
            WeightError, match=r"refused the update: .*'model\.norm\.weight' has shape \(33,\), the model"
        ):
            pool.push_weights(pack(wide, 4))
        update.buckets[0][3] ^= 1
        with pytest.raises(
            WeightError, match=r"refused the update: .*'model\.embed_tokens\.weight' arrived with checksum"
        ):
            pool.push_weights(update)


def same(want, got):
    assert want.keys() == got.keys()
    for name, group in want.items():
        for left, right in zip(group.trajectories, got[name].trajectories, strict=True):
            assert left.tokens.tolist() == right.tokens.tolist()
            np.testing.assert_allclose(left.rollout_logprobs, right.rollout_logprobs, atol=1e-4)
            np.testing.assert_array_equal(left.index_record.indices, right.index_record.indices)


def test_a_worker_in_process(folder):
    """Requests that arrive while others run join them, and a bad one fails alone."""
    with pytest.raises(RuntimeError, match=r"runs winnow .*, the driver 0\.0\.wrong"):
        RolloutWorker(spec_of(folder), 0, "0.0.wrong")
    from winnow.rollout.worker import code_version

    worker = RolloutWorker(spec_of(folder), 4, code_version())

    async def everything():
        first = asyncio.create_task(worker.generate([request_of("a", "x" * 40, max_tokens=60)]))
        second = asyncio.create_task(worker.generate([request_of("b")]))
        bad = await asyncio.gather(worker.generate([request_of("c", "x" * 400)]), return_exceptions=True)
        dropped = asyncio.create_task(worker.generate([request_of("d", max_tokens=100)]))
        await asyncio.sleep(0)  # so that it has been asked for
        await worker.cancel(["d"])
        lost = await asyncio.gather(dropped, return_exceptions=True)
        return await first, await second, bad[0], lost[0], await worker.ping(), await worker.stats()

    first, second, bad, lost, ping, stats = asyncio.run(everything())
    assert names(first) == ["a"] and names(second) == ["b"] and ping["worker"] == 4
    assert isinstance(bad, ValueError) and "the context is 128" in str(bad) and "cancelled" in str(lost)
    assert stats["decode_tokens"] < 2 * 60 + 2 * 12 + 2 * 100


def doubled(folder, version):
    with torch.no_grad():
        state = {name: tensor * 1.5 for name, tensor in load(folder).state_dict().items()}
    return pack(state, version)


def draining(folder, **changes):
    spec = spec_of(folder)
    return replace(spec, engine=replace(spec.engine, max_batch=3, **changes))


@pytest.mark.parametrize("on_update", ["recompute", "drain"])
def test_an_update_meets_what_runs_as_the_config_says(folder, on_update):
    """recompute: samples under way go on under the new weights; drain: they end under the old ones, and nobody begins meanwhile."""
    pool = LocalPool(draining(folder, on_update=on_update))
    requests = [request_of(f"r{i}", "abc " * (3 + i), max_tokens=8 + 6 * i) for i in range(5)]
    arriving = pool.generate(requests)
    groups = [next(arriving)]
    running = len(pool.runner.engine.scheduler.running)
    assert running and pool.push_weights(doubled(folder, 1)) == {0: 1}
    groups += arriving
    assert names(groups) == [f"r{i}" for i in range(5)] and pool.runner.engine.has_work is False
    stamps = [sorted({int(v) for v in t.policy_versions[t.loss_mask]}) for g in groups for t in g.trajectories]
    if on_update == "drain":
        assert all(len(stamp) == 1 for stamp in stamps) and {s[0] for s in stamps} == {0, 1}, stamps
        fresh = LocalPool(draining(folder))
        fresh.push_weights(doubled(folder, 1))
        want = {group.request.request_id: group for group in fresh.generate(requests)}
        new = [t for g in groups for t in g.trajectories if t.policy_versions.max() == 1]
        for left in new:  # who began after the update is what a pool that never had other weights would draw
            right = want[left.request_id].trajectories[left.sample]
            assert left.tokens.tolist() == right.tokens.tolist()
            np.testing.assert_array_equal(left.index_record.indices, right.index_record.indices)
    else:
        assert [0, 1] in stamps and [1] in stamps, stamps


def test_a_drain_that_takes_too_long_is_named_and_the_old_weights_go_on(folder):
    from winnow.rollout.worker import code_version

    worker = RolloutWorker(draining(folder, on_update="drain", drain_timeout_s=0.05), 0, code_version())

    async def everything():
        running = asyncio.create_task(worker.generate([request_of("a", samples=5, max_tokens=100)]))
        while not (await worker.stats())["decode_tokens"]:
            await asyncio.sleep(0.01)
        await worker.pause()
        before = (await worker.stats())["decode_tokens"]
        with pytest.raises(
            TimeoutError, match=r"version 1 waited 0\.05 s for \d samples of version 0 to end.*drain_timeout_s"
        ):
            await worker.load_weights(doubled(folder, 1))  # which resumes
        [group] = await running
        assert before <= 3 * 100 and await worker.load_weights(doubled(folder, 1)) == 1
        return group, await worker.generate([request_of("b")])

    old, [new] = asyncio.run(everything())
    assert {int(t.policy_versions[-1]) for t in old.trajectories} == {0} and len(old.trajectories) == 5
    assert {int(t.policy_versions[-1]) for t in new.trajectories} == {1}
