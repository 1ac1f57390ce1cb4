"""The learner: one model, one optimizer, and a step from a TrainBatch. A plain class, used in-process and as a Ray actor's body.

    TrainBatch -> each update: each micro-batch: forward (own or replayed index sets and experts) -> log-probabilities at trained positions
               -> loss + indexer KL -> backward;   then: checks -> clip -> AdamW   -> StepReport

A step with a non-finite loss or gradient, or with a mismatch past its ceiling, is refused: that update leaves the weights as they
were, the batch is saved below the run folder and `StepRefused` says where and why.

How the model comes here and leaves is in policy.py. Over several ranks (ranks.py) every rank calls the same methods with the same arguments
and trains its own micro-batches; all of them come to the same decision, so that they refuse or update together. What is returned is rank 0's.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.kernels.selection import Selection
from winnow.models.context import IndexerLoss
from winnow.rl import scoring
from winnow.rl.batching import (
    MicroBatch,
    TrainBatch,
    Update,
    make_distillation_batch,
    make_sft_batch,
    pack,
    trajectory_sequence,
)
from winnow.rl.losses import LossInputs, compute_loss
from winnow.rl.metrics import Tally
from winnow.rl.optimizer import non_finite_gradients
from winnow.rl.policy import Policy
from winnow.rl.step_report import STILL, Drift, StepRefused, StepReport, shares, where
from winnow.rl.teachers import Teachers
from winnow.rollout import records
from winnow.rollout.schema import Trajectory


class Learner(Policy):
    """One step at a time on the policy; see the module's docstring."""

    def step(self, batch: TrainBatch) -> StepReport:
        """Trains on one batch. Raises StepRefused, leaving the weights before the faulty update."""
        self.offered = None
        tally, drift = Tally(), Drift()
        extra = drift.metrics()
        old = self._old_logprobs(batch)
        for number, update in enumerate(batch.updates):
            self.optimizer.zero_grad()
            norms: dict[str, float] = {}
            fault = self._accumulate(number, update, old, tally, drift, norms)
            self.optimizer.collect()
            self.ranks.sum_gradients(self.optimizer.indexer if update.micro_batches else ())
            faults = [found for found in self.ranks.gather(fault) if found is not None]
            if faults:
                self._refuse(batch, faults[0][0], number, faults[0][1])
            if number == 0:
                extra = Drift.joined(self.ranks.gather(drift)).metrics()
                self._check_parity(batch, {**STILL, **self._merged(tally).result(), **extra})
            if self.optimizer.has_gradients:
                extra |= self._apply(batch, number) | shares(norms)
        tally = self._merged(tally)
        tally.sums = {
            name: value / len(batch.updates) for name, value in tally.sums.items()
        }  # losses: the mean over updates
        metrics = {**STILL, **tally.result(), **extra, "lr": self.optimizer.lr}
        return StepReport(step=batch.step, metrics={**metrics, "tokens/trained": float(batch.num_trained_tokens)})

    def sft_step(self, examples: Sequence[Any], step: int = 0) -> StepReport:
        """One cross-entropy update on examples: (tokens, loss_mask) pairs, or objects with these two fields."""
        pairs = [e if isinstance(e, tuple) else (e.tokens, e.loss_mask) for e in examples]
        budget = self.config.learner.micro_tokens
        return self.step(make_sft_batch(pairs, step=step, micro_tokens=budget, ranks=self.ranks.world))

    def _merged(self, tally: Tally) -> Tally:
        """The counts of all ranks."""
        if self.ranks.world == 1:
            return tally
        merged = Tally()
        for other in self.ranks.gather(tally.floats()):
            merged.merge(other)
        return merged

    def distill_step(
        self, trajectories: Sequence[Trajectory], teachers: Mapping[str, str], step: int = 0
    ) -> StepReport:
        """One update towards the teachers (domain -> model folder) on the student's own samples: reverse KL per token."""
        if self.teachers is None or self.teachers.paths != dict(teachers):
            self.teachers = Teachers(teachers, self.config.model.dtype, self.device)
        scores = self.teachers.logprobs(trajectories, self.config.learner.micro_tokens, self._selector)
        pairs = zip(trajectories, scores, strict=True)
        budget = self.config.learner.micro_tokens
        return self.step(make_distillation_batch(pairs, step=step, micro_tokens=budget, ranks=self.ranks.world))

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory], replay: bool = False) -> list[np.ndarray]:
        """fp32 [generated tokens] of each trajectory under the present weights, in order: for parity and forgetting measures."""
        found: dict[str, np.ndarray] = {}
        for micro in pack([trajectory_sequence(t) for t in trajectories], self.config.learner.micro_tokens):
            sets = scoring.recorded_selections(micro, self.device) if replay else None
            experts = scoring.recorded_experts(micro, self.device) if replay else None
            with scoring.scored(self.model, micro, replay=sets, experts=experts, selector=self._selector) as result:
                values = result.logprobs.cpu().numpy()
            found |= {key: values[micro.sequence_ids == number] for number, key in enumerate(micro.keys)}
        return [found[trajectory.key] for trajectory in trajectories]

    def _accumulate(
        self,
        number: int,
        update: Update,
        old: Mapping[int, Tensor],
        tally: Tally,
        drift: Drift,
        norms: dict[str, float],
    ) -> tuple[str, str] | None:
        """Adds the gradients of this rank's micro-batches of one update; `norms` gets that of each domain where there are several.

        Returns the first loss that is not finite: what, and where.
        """
        fault: tuple[str, str] | None = None
        parts = self._dealt(update)
        for domain, mine in parts:
            for index, counts in mine:
                found = self._backward(number, update, index, counts, old, tally, drift)
                self.optimizer.absorb()
                fault = fault or found
                if fault and self.ranks.world == 1:
                    return fault
            if len(parts) > 1:
                norms[domain] = float(self.optimizer.end_part())
        return fault

    def _dealt(self, update: Update) -> list[tuple[str, list[tuple[int, bool]]]]:
        """This rank's micro-batches of an update, domain by domain: (index, counts), as `Ranks.deal`. All ranks are in one domain at a
        time, so that the gradient between two of them is one domain's."""
        by_domain: dict[str, list[int]] = {}
        for index, micro in enumerate(update.micro_batches):
            by_domain.setdefault(micro.domains[0], []).append(index)
        return [
            (
                name,
                [(chosen[i], counts) for i, counts in self.ranks.deal([update.micro_batches[i] for i in chosen])],
            )
            for name, chosen in by_domain.items()
        ]

    def _backward(
        self,
        number: int,
        update: Update,
        index: int,
        counts: bool,
        old: Mapping[int, Tensor],
        tally: Tally,
        drift: Drift,
    ) -> tuple[str, str] | None:
        """Forward and backward of one micro-batch, which is gone through and does not count where `counts` is False."""
        fault = None
        micro = update.micro_batches[index]
        kl = IndexerLoss() if self.config.indexer.train == "kl" else None
        recorded = self._recorded(micro)
        replay = recorded if self.config.indexer.selection == "replay" else None
        routed = self._routed(micro)
        routes = routed if self._replays_routing else None
        with scoring.scored(
            self.model, micro, replay=replay, record=recorded is not None and replay is None, experts=routes,
            record_experts=routed is not None and routes is None, indexer_loss=kl, selector=self._selector, states=self.states,
        ) as result:  # fmt: skip
            inputs = self._loss_inputs(micro, result, old.get(id(micro)))
            output = compute_loss(inputs, self.config.algorithm, update.denominators)
            loss = output.loss
            if kl is not None and kl.kl:
                share = kl.sum() / (update.num_inputs * len(kl.kl))
                output.metrics.sum("loss/indexer_kl", share.detach())
                loss = loss + share
            if not torch.isfinite(loss):
                fault = (f"the loss is {loss.item()}", where(index, micro, inputs.logprobs))
                if self.ranks.world == 1:
                    return fault
            if loss.requires_grad:
                (loss if counts else loss * 0.0).backward()
        if counts:
            tally.merge(output.metrics)
            if number == 0 and (update.denominators.sequences or update.denominators.kl_tokens):
                drift.add(inputs.logprobs.detach(), micro.rollout_logprobs)
            if number == 0:
                self._tally_index(micro, result.selections, recorded, replay is not None, tally)
                if routed is not None and result.experts:
                    tokens, of_tokens, choices, of_choices = records.experts_differ(result.experts, routed)
                    tally.add("routing/tokens_differ", tokens, of_tokens)
                    tally.add("routing/choices_differ", choices, of_choices)
        return fault

    def _apply(self, batch: TrainBatch, number: int) -> dict[str, float]:
        """Clips and steps, unless a gradient is not finite. Returns the norms."""
        norms = {name: float(norm) for name, norm in self.optimizer.clip().items()}
        if not all(np.isfinite(norm) for norm in norms.values()):
            found = self.ranks.gather(non_finite_gradients(self.model.named_parameters(), self.optimizer))
            bad = sorted({name for of_rank in found for name in of_rank})
            self._refuse(
                batch, f"the gradient is not finite (norms {norms}; first of {len(bad)} tensors: {bad[:1]})", number
            )
        self.optimizer.step()
        return norms

    def _loss_inputs(self, micro: MicroBatch, result: scoring.Scored, old: Tensor | None) -> LossInputs:
        device = result.logprobs.device

        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, device=device)

        rollout = tensor(micro.rollout_logprobs)
        if old is None:  # one update per batch: the policy before it is the present one
            old = result.logprobs.detach() if self.config.algorithm.recompute_old else rollout
        ref = None
        if self.reference is not None and (self.ranks.world > 1 or (micro.betas > 0).any()):  # ranks stay in step
            with torch.no_grad(), scoring.scored(self.reference, micro, selector=self._selector) as frozen:
                ref = frozen.logprobs
        lengths = np.bincount(micro.sequence_ids, minlength=len(micro.keys)).astype(np.float32)
        teacher = None if micro.teacher_logprobs is None else tensor(micro.teacher_logprobs)
        return LossInputs(
            logprobs=result.logprobs,
            domains=micro.domains,
            entropy=result.entropy,
            old_logprobs=old,
            rollout_logprobs=rollout,
            ref_logprobs=ref,
            sequence_ids=tensor(micro.sequence_ids),
            lengths=tensor(lengths),
            advantages=tensor(micro.advantages),
            weights=tensor(micro.weights),
            betas=tensor(micro.betas),
            ce_weights=None if micro.ce_weights is None else tensor(micro.ce_weights),
            teacher_logprobs=None if teacher is None else torch.nan_to_num(teacher),
            teacher_weights=None if teacher is None else torch.isfinite(teacher).float(),
        )

    @torch.no_grad()
    def _old_logprobs(self, batch: TrainBatch) -> dict[int, Tensor]:
        """Log-probabilities before the first of several updates, by micro-batch. With one update the forward pass gives them."""
        if not self.config.algorithm.recompute_old or len(batch.updates) < 2:
            return {}
        old = {}
        for micro in (u.micro_batches[i] for u in batch.updates for _, mine in self._dealt(u) for i, _ in mine):
            replay = self._recorded(micro) if self.config.indexer.selection == "replay" else None
            routes = self._routed(micro) if self._replays_routing else None
            with scoring.scored(self.model, micro, replay=replay, experts=routes, selector=self._selector) as result:
                old[id(micro)] = result.logprobs
        return old

    @property
    def _selector(self) -> str:
        return self.config.indexer.selector

    # -------------------------------------------------------------------------------------------------------------------- checks

    def _recorded(self, micro: MicroBatch) -> dict[int, Selection] | None:
        """The rollout's sets: for replay, where no sequence past top_k may lack one, and to measure overlap. None: nothing recorded."""
        if self.top_k is None or not micro.index_records:
            return None
        lengths = np.diff(micro.cu_seqlens)
        bare = [
            key
            for key, record, n in zip(micro.keys, micro.index_records, lengths, strict=True)
            if record is None and n > self.top_k
        ]
        if not bare:
            return scoring.recorded_selections(micro, self.device)
        if self.config.indexer.selection == "replay" and micro.ce_weights is None:
            raise ValueError(
                f"indexer.selection is replay, but trajectory {bare[0]} carries no index record: set rollout.record_indices to true"
            )
        return None

    @property
    def _replays_routing(self) -> bool:
        return self.config.learner.routing == "replay"

    def _routed(self, micro: MicroBatch) -> dict[int, Tensor] | None:
        """The rollout's experts: for replay, where no sequence may lack them, and to measure how many differ. None: nothing recorded."""
        found = scoring.recorded_experts(micro, self.device)
        if found is None and self._replays_routing and micro.ce_weights is None:
            bare = next((k for k, r in zip(micro.keys, micro.expert_records, strict=False) if r is None), micro.keys[0])
            raise ValueError(
                f"learner.routing is replay, but trajectory {bare} carries no expert record: set rollout.record_experts to true, and "
                "rollout.engine to native"
            )
        return found

    def _tally_index(
        self,
        micro: MicroBatch,
        own: Mapping[int, Selection],
        recorded: Mapping[int, Selection] | None,
        replayed: bool,
        tally: Tally,
    ) -> None:
        selected, sparse, rows = scoring.sparsity(micro, self.top_k)
        tally.add("index/selected_share", selected, rows)
        tally.add("index/sparse_rows", sparse, rows)
        if recorded is None or self.top_k is None:
            return
        positions = torch.as_tensor(micro.positions, device=self.device)
        pairs = recorded if replayed else own
        for layer, (total, count) in scoring.overlap_by_layer(pairs, recorded, positions, self.top_k).items():
            if count:
                tally.add("index/jaccard", total, count)
                tally.add(f"index/jaccard_layer/{layer}", total, count)

    def _check_parity(self, batch: TrainBatch, metrics: Mapping[str, float]) -> None:
        """Before the first update, rollout and learner must score alike and attend alike, within the configured bounds."""
        ceiling, floor = self.config.algorithm.max_mismatch, self.config.indexer.min_overlap
        if metrics["mismatch/k3_kl"] > ceiling:
            self._refuse(
                batch,
                f"mismatch/k3_kl between rollout and learner is {metrics['mismatch/k3_kl']:.3g}, above algorithm.max_mismatch={ceiling}: "
                "the two score the same tokens differently, so check that both have the same weights, kept sets and index sets",
                0,
            )
        if metrics["index/jaccard"] < floor:
            self._refuse(
                batch,
                f"index/jaccard is {metrics['index/jaccard']:.3f}, below indexer.min_overlap={floor}: learner and rollout attend to "
                "different positions; set indexer.selection to replay, or lower min_overlap",
                0,
            )

    def _refuse(self, batch: TrainBatch, why: str, update: int, place: str = "") -> None:
        """Drops the gradients, saves the batch (the first rank does) and raises StepRefused."""
        self.optimizer.zero_grad()
        folder = self.config.folder / "refused"
        path = folder / f"step-{batch.step:06d}.pkl"
        if self.ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(batch))
        where = f"step {batch.step}, update {update + 1} of {len(batch.updates)}{place}"
        raise StepRefused(f"{where}: {why}. The update was not made; the batch is in {path}")
