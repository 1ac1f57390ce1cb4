"""The sections of a run's config: each key with its type, range and default, which has its one home here."""

from __future__ import annotations

from dataclasses import dataclass, field

from winnow.rl.config_fields import choice, number


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = ""  # a model folder, converted or dense
    dtype: str = choice("float32", "float32", "bfloat16")
    reference: str | None = (
        "initial"  # whose log-probabilities `beta` pulls towards: "initial" (= path), a folder, or null
    )


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    name: str = ""
    source: str = ""  # a procedural kind, a JSONL path, gsm8k or a hub dataset
    path: str | None = None  # where the file of a named source lies
    fields: dict[str, str] = field(default_factory=dict)  # prompt, answer, system, id -> the source's own names
    reward: str | None = None  # a grader other than the source's own
    level: int = number(1, low=0)
    count: int = number(256, low=1)  # tasks to train on
    holdout: int = number(64, low=0)  # tasks kept for evaluation
    quota: int = number(8, low=1)  # prompts per step
    weight: float = number(1.0, low=0, open_low=True)  # share of the gradient, relative to the other domains
    beta: float = number(0.0, low=0)  # strength of the KL to the reference
    max_tokens: int = number(64, low=1)  # per turn
    max_turns: int = number(1, low=1)
    max_total_tokens: int | None = number(
        None, low=1
    )  # of an episode: prompt and every turn; null: the engine's context
    parts: dict[str, float] = field(
        default_factory=dict
    )  # reward parts with weights: each normalised in its group, then summed (GDPO); empty: the reward itself
    environment: str | None = None  # for rows of a file: where their episodes take place
    template: dict = field(default_factory=dict)  # options of the chat template, e.g. {enable_thinking: false}
    length_penalty: float = number(0.0, low=0)  # weight of the soft overlong penalty
    script: str = "latin"  # what replies should be written in, for language_penalty: latin, cyrillic, cjk, ...
    language_penalty: float = number(0.0, low=0)  # for all letters in another script
    repetition_penalty: float = number(0.0, low=0)  # for nothing but repeated groups of four words
    token_budget: int = number(0, low=0)  # generated tokens that cost nothing; 0: no budget
    budget_penalty: float = number(0.0, low=0)  # for twice the budget and more


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    engine: str = choice("native", "native", "vllm")
    workers: int = number(1, low=1)
    threads: int = number(1, low=1)
    samples: int = number(8, low=2)  # per prompt
    temperature: float = number(1.0, low=0, open_low=True)
    top_p: float = number(1.0, low=0, high=1, open_low=True)
    top_k: int = number(0, low=0)
    min_p: float = number(0.0, low=0, high=1, open_high=True)
    page_size: int = number(16, low=1)
    num_pages: int = number(2048, low=1)
    max_batch: int = number(64, low=1)
    prefill_chunk: int = number(512, low=1)
    cuda_graphs: bool = True  # decode steps as CUDA graphs, where there is a GPU
    record_indices: bool = True  # carry the selected sets with every trajectory: for index/jaccard and for replay
    record_experts: bool = True  # of a model with experts: carry each token's, for routing/* and for replay
    request_timeout_s: float = number(600.0, low=0, open_low=True)
    reuse_prefixes: bool = (
        True  # a prompt starts behind what earlier requests left of it in the cache, within one version
    )
    on_update: str = choice(
        "recompute", "recompute", "drain"
    )  # new weights: live samples go on under them at once, or end under the old ones first
    drain_timeout_s: float = number(300.0, low=0, open_low=True)  # how long an update waits for them

    @property
    def cache_tokens(self) -> int:
        """Tokens of a worker's cache: num_pages * page_size."""
        return self.num_pages * self.page_size


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    ranks: int = number(
        1, low=1
    )  # processes that the model and the micro-batches are split over, each with learner_gpus
    lr: float = number(1e-5, low=0)
    weight_decay: float = number(0.0, low=0)  # matrices only
    betas: tuple[float, float] = number((0.9, 0.95), low=0, high=1, open_high=True)
    warmup_steps: int = number(0, low=0)
    max_grad_norm: float = number(1.0, low=0, open_low=True)
    micro_tokens: int = number(4096, low=1)  # tokens of one packed micro-batch; a longer sequence gets one of its own
    threads: int = number(1, low=1)
    routing: str = choice("own", "own", "replay")  # of a model with experts: which tokens go to which
    updates_per_batch: int = number(1, low=1)
    checkpointing: bool = False  # recompute activations in the backward pass
    cuda_graphs: bool = (
        False  # what concerns a token alone as CUDA graphs: for small models, whose launches take longer than they run
    )
    restarts: int = number(
        0, low=0
    )  # how often a dead learner process is replaced, from the last checkpoint; then the run fails


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    name: str = choice("grpo", "grpo", "gspo", "cispo")
    eps_low: float = number(0.2, low=0, open_low=True)
    eps_high: float = number(0.28, low=0, open_low=True)
    advantage_scale: str = choice("none", "none", "std", "batch")  # divide by the group's std, or by the batch's (GDPO)
    std_floor: float = number(1e-3, low=0, open_low=True)
    aggregate: str = choice("sequence", "sequence", "token")
    balance: str = choice(
        "domains", "domains", "none"
    )  # domains: each has its share of the gradient, however many samples survive
    truncated: str = choice("mask", "mask", "keep")
    correction: str = choice("none", "none", "tis", "icepop", "opsm")
    opsm_delta: float = number(1e-2, low=0)
    tis_cap: float = number(2.0, low=1)
    keep_kept_sets: bool = True  # the learner scores each token on the set it was drawn from
    recompute_old: bool = False  # old_logprobs from the learner instead of the rollout's own
    max_mismatch: float = number(0.1, low=0, open_low=True)  # mismatch/k3_kl above this stops the run
    dynamic_rounds: int = number(0, low=0)  # rounds of further prompts for those whose samples all got the same reward
    max_failures: float = number(
        0.25, low=0, high=1
    )  # a larger share of a domain's samples without a score stops the run


@dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    train: str = choice("frozen", "frozen", "kl")
    selection: str = choice("own", "own", "replay")
    selector: str = choice(
        "indexer", "indexer", "random", "recent", "dense", "random_ties"
    )  # what selects, on both sides; all but the first: ablations. random_ties: a top-k that breaks ties of 16-bit scores at random
    lr: float = number(1e-4, low=0)
    min_overlap: float = number(0.0, low=0, high=1)  # index/jaccard below this stops the run


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: str = choice("sync", "sync", "one_step_off", "async")  # whether the rollout runs ahead of the learner
    sync_every: int = number(
        1, low=1
    )  # sync: steps from one weight update of the rollout to the next; above 1: an ablation
    max_staleness: int = number(4, low=1)  # async: how many versions behind a token may be when it is trained
    steps: int = number(20, low=1)
    save_every: int = number(10, low=0)  # 0: only at the end
    keep: int = number(2, low=0)  # the newest checkpoints; 0: none is ever written, and the run cannot be resumed
    keep_best: bool = True  # and the best one by held-out reward, saved when an evaluation finds it
    eval_every: int = number(0, low=0)  # 0: never

    def pushes(self, step: int) -> bool:
        """Whether the rollout gets the weights of this step: every `sync_every` steps, for an evaluation, and at the end."""
        due = bool(self.eval_every) and step % self.eval_every == 0
        return due or step % self.sync_every == 0 or step == self.steps


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    limit: int = number(64, low=1)  # tasks per domain
    samples: int = number(1, low=1)
    temperature: float = number(0.0, low=0)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    address: str = (
        "local"  # "local" starts Ray on this machine; "auto" or host:port joins a cluster; RAY_ADDRESS wins over "local"; "here": no
        # Ray at all, learner and engine take turns in the driver's own process, on one GPU or none
    )
    learner_gpus: float = number(0.0, low=0)
    worker_gpus: float = number(0.0, low=0)
    strategy: str = choice("PACK", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    colocate: bool = False  # each learner rank shares one GPU with its share of the workers
    transport: str = choice("auto", "auto", "store", "ipc", "nccl")  # of weights to the engines, see transports.py
    bucket_mb: int = number(256, low=1)  # ipc, nccl: megabytes that travel at a time
    stall_timeout_s: float = number(
        20.0, low=0, open_low=True
    )  # ipc, nccl: without progress, before a transfer is given up
    start_timeout_s: float = number(300.0, low=0, open_low=True)
    step_timeout_s: float = number(3600.0, low=0, open_low=True)  # one call of the learner


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who answers the questions of rubrics, and who checks that answer. Programmatic criteria need no judge."""

    model: str = (
        ""  # "policy": the policy itself, as it is now; a model folder: that checkpoint, on this machine; "": nobody
    )
    holdout: str = ""  # a stronger judge's folder: compared with the first one at every step, never rewarded by
    holdout_samples: int = number(32, low=1)  # a step
    min_mass: float = number(1e-3, low=0, high=1)  # yes and no together; below it the judge has not answered
    device: str = "cpu"
    dtype: str = choice("float32", "float32", "bfloat16")
    threads: int = number(1, low=1)
    num_pages: int = number(1024, low=1)
