"""What goes to SGLang and what comes back, as plain values: no SGLang is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from redone.config.schema import Config, SglangEngine
from redone.errors import EngineError
from redone.types import Completion, Finish, FloatArray, Sampling, VersionSpan

SAMPLER = "pytorch"  # the name under which our sampler is registered: on CPU SGLang allows no other
SEED_MASK = 2**63 - 1
# SGLang refuses prompts within 6 tokens of its context length, and cuts responses 2 before it.
CONTEXT_SLACK = 8
CPU_CONTEXTS = 8  # default KV cache, in context lengths
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


def sglang_arguments(cfg: Config, limit: int) -> dict[str, Any]:
    """SGLang's ServerArgs for a context of `limit` tokens. EngineError when the KV cache is too small."""
    engine, cuda = cfg.rollout.engine, cfg.cluster.device == "cuda"
    assert isinstance(engine, SglangEngine)
    context = limit + CONTEXT_SLACK
    if engine.max_total_tokens is not None and engine.max_total_tokens <= context:
        raise EngineError(
            f"rollout.engine.max_total_tokens={engine.max_total_tokens} holds no response of {limit} tokens; "
            f"raise it above {context}, or lower model.max_model_len"
        )
    args: dict[str, Any] = dict(
        model_path=cfg.model.path,
        trust_remote_code=cfg.model.trust_remote_code,
        dtype=cfg.model.dtype,
        skip_tokenizer_init=True,
        random_seed=cfg.run.seed,
        context_length=context,
        max_running_requests=engine.max_num_seqs,
        max_total_tokens=engine.max_total_tokens,
        tp_size=cfg.rollout.tensor_model_parallel_size,
        disable_cuda_graph=engine.enforce_eager,
        attention_backend=engine.attention_backend,
        sampling_backend=SAMPLER,
        log_level="info" if cfg.run.log_level == "debug" else "warning",
        weight_version="0",
    )
    if cuda:
        return args | dict(
            device="cuda",
            mem_fraction_static=cfg.rollout.gpu_memory_utilization,
            enable_memory_saver=True,
            enable_weights_cpu_backup=True,
        )
    return args | dict(
        device="cpu",
        attention_backend=engine.attention_backend or "torch_native",
        disable_overlap_schedule=True,
        max_total_tokens=engine.max_total_tokens or CPU_CONTEXTS * context,
    )


def request_parameters(sampling: Sampling, limit: int, seed: int) -> dict[str, Any]:
    """SGLang's sampling parameters of one request of at most `limit` tokens."""
    if sampling.top_k == 1 and sampling.temperature > 0:
        raise EngineError("top_k=1 is greedy for SGLang; use temperature=0")
    return dict(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=limit,
        stop_token_ids=list(sampling.stop_token_ids),
        # For SGLang this turns off stop_token_ids as well.
        ignore_eos=not sampling.stop_token_ids,
        sampling_seed=int(seed) & SEED_MASK,
    )


def score_parameters() -> dict[str, Any]:
    """One token is written behind the sequence, at temperature 1."""
    return request_parameters(Sampling(max_tokens=1, ignore_eos=True), 1, 0)


def completion_of(output: Mapping[str, Any], limit: int) -> Completion:
    """A completion without text. EngineError when SGLang cut it below its own `limit`."""
    ids, meta = list(output["output_ids"]), output["meta_info"]
    rows = meta["output_token_logprobs"]
    if [row[1] for row in rows] != ids:
        raise EngineError(f"SGLang's log-probabilities belong to other tokens: {rows[:3]} for {ids[:3]}")
    finish = _FINISH[(meta["finish_reason"] or {"type": "abort"})["type"]]
    if finish == "length" and len(ids) < limit:
        raise EngineError(
            f"SGLang cut a response at {len(ids)} of {limit} tokens: its KV cache is too small; raise "
            "rollout.engine.max_total_tokens or rollout.gpu_memory_utilization"
        )
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
    return Completion(
        token_ids=np.asarray(ids, np.int32),
        text="",
        logprobs=np.asarray([row[0] for row in rows], np.float32),
        finish=finish,
        versions=tuple(
            VersionSpan(version=int(s["version"]), start=int(s["start"]), end=int(s["end"])) for s in spans
        ),
    )


def scores_of(output: Mapping[str, Any], sequence: Sequence[int]) -> FloatArray:
    """[len - 1] fp32; the first token of a sequence has no log-probability."""
    rows = output["meta_info"]["input_token_logprobs"]
    if [row[1] for row in rows] != list(sequence):
        raise EngineError(f"SGLang scored {len(rows)} tokens of a sequence of {len(sequence)}")
    return np.asarray([row[0] for row in rows[1:]], np.float32)
