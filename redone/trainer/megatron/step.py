"""One pass over a shard through Megatron's pipeline schedule: log-probabilities, or loss and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from redone.algo.loss import LossInputs, policy_loss, with_effective_sample_size
from redone.config.schema import AlgorithmConfig
from redone.data.pack import empty_microbatch, pad_row
from redone.errors import TrainerError
from redone.layout import padding_multiple
from redone.trainer.megatron import context
from redone.trainer.megatron.attention import PackedRow, make_plan
from redone.trainer.megatron.device import device
from redone.trainer.megatron.head import Entropy
from redone.trainer.megatron.token_loss import TokenLoss
from redone.types import FloatArray, Microbatch, Shard

Output = tuple[Tensor, ...]  # the last stage's logprobs [N], entropy [N] or [0]; see head.Head
COMPUTED, UNSHARED = "prefix/computed_tokens", "prefix/unshared_tokens"
# (whole micro-batch, this rank's part of it, output of the part) -> (loss, value to keep)
LossFunction = Callable[[Microbatch, Microbatch, Output], tuple[Tensor, Any]]


def pack_row(
    microbatch: Microbatch,
    temperature: float,
    entropy: Entropy,
    token_loss: TokenLoss | None = None,
    record: bool = False,
) -> PackedRow:
    """This rank's part of a micro-batch as the model reads it, on the device."""
    where = device()
    max_length = int(microbatch.positions.max()) + 1

    def index(array: Any) -> Tensor:
        return torch.from_numpy(array).to(where, torch.int64)

    return PackedRow(
        qkv_format="sbhd",
        max_seqlen_q=max_length,
        max_seqlen_kv=max_length,
        plan=make_plan(microbatch.segments, where, *context.place()),
        positions=index(microbatch.positions),
        rows=index(microbatch.rows),
        targets=index(microbatch.targets),
        temperature=temperature,
        entropy=entropy,
        loss=None if token_loss is None else token_loss.rows(microbatch, where),
        token_weight=torch.from_numpy(microbatch.token_weight).to(where),
        routes=None if microbatch.routes is None else torch.from_numpy(microbatch.routes).to(where),
        record=record,
    )


def run(
    models: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    loss: LossFunction,
    *,
    temperature: float,
    entropy: Entropy,
    train: bool,
    token_loss: TokenLoss | None = None,
    after: Callable[[torch.nn.Module], None] | None = None,
) -> list[Any]:
    """Drive the schedule; the second value of `loss` per micro-batch, on the last pipeline stage.

    With `token_loss` the head may make the loss and its gradient itself. `after` sees the chunk after each
    forward.
    """
    for model in models:
        model.train(train)
    wanted = len(microbatches)
    if len(models) > 1:
        microbatches = _for_interleaving(microbatches, row_multiple(models[0].config))

    def forward_step(iterator: Iterator[Microbatch], module: torch.nn.Module) -> tuple[Any, Any]:
        whole = next(iterator)
        mine = context.part(whole, *context.place())
        row = pack_row(mine, temperature, entropy, token_loss, record=after is not None)
        ids = torch.from_numpy(mine.token_ids).to(device(), torch.int64)[None]
        output = module(ids, row.positions[None], None, packed_seq_params=row)  # type: ignore[index]
        if after is not None:
            after(module)
        return output, lambda out: loss(whole, mine, out)

    with torch.set_grad_enabled(train):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in models],
            model=list(models),
            num_microbatches=len(microbatches),
            # Read with virtual stages only: otherwise the real length is sent with every tensor.
            seq_length=len(microbatches[0].token_ids),
            micro_batch_size=1,
            forward_only=not train,
        )
    return results[:wanted]


def _for_interleaving(microbatches: Sequence[Microbatch], multiple: int) -> list[Microbatch]:
    """A multiple of the pipeline size, as the schedule wants it, and rows of one length: padding is added.

    Lengths that vary would be announced before each tensor; interleaved, that announcement deadlocks when all
    micro-batches are warm-up, and confuses the two directions between two stages.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    filler = empty_microbatch(multiple)
    result = [*microbatches, *[filler] * (-len(microbatches) % stages)]
    longest = max(len(m.token_ids) for m in result)
    return [pad_row(m, longest) for m in result]


def row_multiple(config: TransformerConfig) -> int:
    """Rows of a pass have a multiple of this many tokens."""
    return padding_multiple(
        config.tensor_model_parallel_size, config.context_parallel_size, config.fp8 is not None
    )


def forward_logprobs(
    models: Sequence[torch.nn.Module],
    shard: Shard,
    temperature: float,
    after: Callable[[torch.nn.Module], None] | None = None,
) -> list[FloatArray] | None:
    """One [N] fp32 array per micro-batch on the last stage's tensor and context rank 0; None elsewhere."""

    def keep(whole: Microbatch, _: Microbatch, output: Output) -> tuple[Tensor, FloatArray]:
        return output[0].sum(), context.join_rows(output[0].detach(), whole).cpu().numpy()

    results = run(
        models, shard.microbatches, keep, temperature=temperature, entropy="none", train=False, after=after
    )
    return results if holds_output() and context.place()[0] == 0 else None


def holds_output() -> bool:
    """Last pipeline stage and tensor rank 0: one such rank per part of a data-parallel replica's rows."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


@dataclass(slots=True)
class Totals:
    """Metrics of one step: loss and sums add up over micro-batches and ranks, maxima combine by max."""

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, sums: Mapping[str, float], maxima: Mapping[str, float]) -> None:
        self.loss += loss
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        for key, value in maxima.items():
            self.maxima[key] = max(self.maxima.get(key, -math.inf), value)

    def metrics(self) -> dict[str, float]:
        found = {**with_effective_sample_size(self.sums), **self.maxima}
        computed, unshared = found.pop(COMPUTED, 0.0), found.pop(UNSHARED, 0.0)
        return {**found, "prefix/token_ratio": unshared / computed} if computed else found


def token_sums(microbatch: Microbatch) -> dict[str, float]:
    """Tokens that are computed, and that the unshared batch would have."""
    weight = microbatch.token_weight
    return {COMPUTED: float((weight > 0).sum()), UNSHARED: float(weight.sum())}


def forward_backward(
    models: Sequence[torch.nn.Module], shard: Shard, algorithm: AlgorithmConfig, temperature: float
) -> Totals:
    """Accumulate the gradients of the whole step's loss; the totals are the same on every rank.

    Raises TrainerError on every rank when the loss is not finite anywhere; no parameter has changed then.
    """
    # Megatron divides each loss by the number of micro-batches and averages gradients over data-parallel
    # ranks, while policy_loss already is a share of the step's loss.
    count, replicas = len(shard.microbatches), parallel_state.get_data_parallel_world_size()
    if len(models) > 1:  # see _for_interleaving
        count += -count % parallel_state.get_pipeline_model_parallel_world_size()
    # It also multiplies by the context-parallel size; the gradient of a TokenLoss must arrive as 1.
    place, parts_of_row = context.place()
    token_loss = TokenLoss.of(algorithm, shard, replicas * parts_of_row)

    def loss(whole: Microbatch, mine: Microbatch, output: Output) -> tuple[Tensor, Totals]:
        total = Totals()
        total.add(0.0, token_sums(mine), {})
        if token_loss is not None:
            rows = token_loss.rows(mine, output[0].device)
            fused = output[2:] or rows.apart(*output)
            total.add(*token_loss.report(fused[1], rows, output[0]))
            return fused[0] * (count / parts_of_row), total
        if not len(whole.rows):
            return output[0].sum() * 0.0, total
        # Sequences may be cut over context ranks: each of them computes the whole loss.
        joined = tuple(context.join_rows(x, whole) for x in output)
        result = policy_loss(
            loss_inputs(whole, joined), algorithm, shard.num_loss_tokens, shard.num_sequences
        )
        if place == 0:
            total.add(float(result.loss.detach()), _floats(result.sums), _floats(result.maxima))
        return result.loss * (count * replicas), total

    entropy: Entropy = "grad" if algorithm.entropy_coeff > 0 else "value"
    parts: list[Totals] = run(
        models,
        shard.microbatches,
        loss,
        temperature=temperature,
        entropy=entropy,
        train=True,
        token_loss=token_loss,
    )
    totals = _join_ranks(parts if holds_output() else [])
    if not math.isfinite(totals.loss):
        raise TrainerError(
            f"the loss is {totals.loss}: the step was not applied. Look at actor/grad_norm and the ratio of"
            " the last steps; lower trainer.optim.lr or check rewards and log-probabilities"
        )
    return totals


def loss_inputs(microbatch: Microbatch, output: Output) -> LossInputs:
    """What the loss reads. Without old log-probabilities the current ones stand in (ratio 1, on-policy)."""
    where = output[0].device
    logprobs, entropy = output[:2]

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(where)

    old = microbatch.old_logprobs
    reference = microbatch.ref_logprobs
    return LossInputs(
        logprobs=logprobs,
        entropy=entropy if entropy.numel() else None,
        old_logprobs=logprobs.detach() if old is None else tensor(old),
        engine_logprobs=tensor(microbatch.engine_logprobs),
        ref_logprobs=None if reference is None else tensor(reference),
        advantages=tensor(microbatch.advantages),
        loss_mask=tensor(microbatch.loss_mask),
        sequence_ids=tensor(microbatch.sequence_ids).to(torch.int64),
    )


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _join_ranks(parts: Sequence[Totals]) -> Totals:
    """Sum over micro-batches and over all ranks that hold output."""
    everyone: list[Sequence[Totals]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, list(parts))
    joined = Totals()
    for part in (p for per_rank in everyone for p in per_rank):
        joined.add(part.loss, part.sums, part.maxima)
    return joined
