"""Token-level losses whose denominator is known before the step: what the kernels compute in one pass.

`linear_dapo` makes their gradient inside the head's forward, `dapo_loss` makes it from log-probabilities;
both return the sums behind every metric in one vector. Other losses go through redone.algo.loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from redone_kernels.dapo_loss import METRICS, DapoConfig, dapo_loss
from torch import Tensor

from redone.algo.loss import mismatch_sums
from redone.config.schema import AlgorithmConfig, DapoLoss, DrGrpoLoss
from redone.types import Microbatch, Shard

# metric of a step -> entries of the vector that add up to it, over the step's loss tokens
SUMS = {
    "actor/pg_clipfrac": ("clip_high", "clip_low"),
    "actor/pg_clipfrac_lower": ("dual_clip",),
    "actor/ppo_kl": ("k1_old",),
    "training/rollout_logprobs_diff_mean": ("rollout_diff",),
    "training/rollout_probs_diff_mean": ("rollout_prob_diff",),
    "actor/entropy": ("entropy",),
}
MAXIMA = {
    "actor/ratio_max": "ratio_max",
    "training/rollout_logprobs_diff_max": "rollout_diff_max",
    "training/rollout_probs_diff_max": "rollout_prob_diff_max",
}


@dataclass(frozen=True, slots=True, eq=False)
class LossRows:
    """Inputs of one micro-batch's loss, [N] on the device; without `old` the policy is the old one."""

    old: Tensor | None
    advantages: Tensor
    mask: Tensor  # bool
    rollout: Tensor
    ref: Tensor | None
    denom: float  # of the gradient, data-parallel averaging undone
    cfg: DapoConfig

    def apart(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(loss with its graph, metric vector) from log-probabilities that somebody else made."""
        out = dapo_loss(
            logprobs, logprobs.detach() if self.old is None else self.old, self.advantages, self.mask,
            self.denom, self.cfg, ref_logprob=self.ref, rollout_logprob=self.rollout, entropy=entropy,
        )  # fmt: skip
        return out.loss, out.metrics


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """The loss of one optimizer step; `of` says whether there is one."""

    cfg: DapoConfig
    denom: float  # of the step's loss
    tokens: int  # loss tokens of the step
    replicas: int  # data-parallel (and context-parallel) ranks, over which Megatron averages gradients
    importance: bool
    kl: bool

    @classmethod
    def of(cls, algorithm: AlgorithmConfig, shard: Shard, replicas: int) -> TokenLoss | None:
        """None where the loss needs whole sequences (ratio, mean, weight) or other terms."""
        loss, importance = algorithm.loss, algorithm.importance
        if not isinstance(loss, DapoLoss | DrGrpoLoss) or importance.level == "sequence":
            return None
        weighted = importance.level == "token"
        cfg = DapoConfig(
            clip_low=loss.clip_ratio_low,
            clip_high=loss.clip_ratio_high,
            dual_clip=loss.clip_ratio_c if isinstance(loss, DapoLoss) else None,
            tis_cap=importance.cap if weighted else None,
            tis_mode="clip" if importance.mode == "truncate" else "mask",
            kl_beta=algorithm.kl.coef,
            kl=algorithm.kl.estimator,
            ent_coef=algorithm.entropy_coeff,
        )
        tokens = shard.num_loss_tokens
        denom = tokens if isinstance(loss, DapoLoss) else loss.length * shard.num_sequences
        return cls(cfg, float(denom), tokens, replicas, weighted, algorithm.kl.coef > 0)

    def rows(self, microbatch: Microbatch, where: torch.device) -> LossRows:
        """Raises ValueError where the loss has a KL term and the micro-batch no reference policy."""

        def tensor(array: Any) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(where)

        ref = tensor(microbatch.ref_logprobs) if self.kl else None
        if self.kl and ref is None:
            raise ValueError("algorithm.kl.coef > 0 needs ref_logprobs")
        advantages, mask = tensor(microbatch.advantages), tensor(microbatch.loss_mask)
        rollout = tensor(microbatch.engine_logprobs)
        assert advantages is not None and mask is not None and rollout is not None
        return LossRows(
            old=tensor(microbatch.old_logprobs),
            advantages=advantages,
            mask=mask,
            rollout=rollout,
            ref=ref,
            denom=self.denom / self.replicas,
            cfg=self.cfg,
        )

    def report(
        self, vector: Tensor, rows: LossRows, logprobs: Tensor
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """(share of the step's loss, sums, maxima) as redone.algo.loss names them; one copy to the host."""
        old = logprobs.detach() if rows.old is None else rows.old
        mismatch = mismatch_sums(old, rows.rollout, rows.mask)
        everything = torch.cat([vector, torch.stack(list(mismatch.values())).to(vector.dtype)])
        values = dict(zip([*METRICS, *mismatch], everything.tolist(), strict=True))
        sums = {name: sum(values[key] for key in keys) / self.tokens for name, keys in SUMS.items()}
        maxima = {name: values[key] for name, key in MAXIMA.items()}
        sums |= {name: values[name] / self.tokens for name in mismatch}
        sums["actor/pg_loss"] = values["pg_loss"] / self.denom
        if self.importance:
            sums["actor/importance_weight"] = values["tis_weight"] / self.tokens
            sums["actor/importance_weight_capped"] = values["tis_capped"] / self.tokens
            maxima["actor/importance_weight_max"] = values["tis_weight_max"]
        if self.kl:
            sums["actor/kl_loss"] = values["kl_ref"] / self.denom
        return values["loss"] / self.denom, sums, maxima
