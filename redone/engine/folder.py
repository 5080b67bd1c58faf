"""What an engine must know about a Hugging Face folder before loading it: limits, end tokens, tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from redone.config.schema import Config
from redone.errors import EngineError, SyncError
from redone.types import WeightPlan
from redone.weights.quantize import SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """tensors: name -> shape of all tensors in the safetensors files; None when there are no such files."""

    path: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]  # of generation_config.json and config.json together
    tied_embeddings: bool
    tensors: dict[str, tuple[int, ...]] | None

    @staticmethod
    def read(path: str) -> ModelFolder:
        """Read the JSON files and the headers of the weight files. EngineError when something is missing."""
        folder = Path(path)
        config, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
        if config is None:
            raise EngineError(
                f"model.path={path}: no config.json there; give a local Hugging Face model folder"
            )
        for key in ("vocab_size", "max_position_embeddings"):
            if not isinstance(config.get(key), int):
                raise EngineError(f"model.path={path}: config.json has no {key}; is this a language model?")
        return ModelFolder(
            path=path,
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            eos_token_ids=_eos_ids(config) + _eos_ids(generation or {}),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            tensors=_read_headers(folder),
        )

    def check_plan(self, plan: WeightPlan) -> None:
        """Raises SyncError naming the first tensor that is missing, unknown or of another shape.

        vLLM would keep the old values of a tensor that nobody sends, without a word.
        """
        if self.tensors is None:
            return
        optional = {"lm_head.weight"} if self.tied_embeddings else set()
        sent = {t.name: t.shape for t in plan.tensors}
        for name, shape in self.tensors.items():
            if name not in sent and name not in optional and not name.endswith("rotary_emb.inv_freq"):
                raise SyncError(f"weight plan {plan.hash} lacks tensor {name!r}, which {self.path} holds")
            if name in sent and sent[name] != shape:
                raise SyncError(
                    f"weight plan {plan.hash}: tensor {name!r} has shape {list(sent[name])}, in "
                    f"{self.path} it has {list(shape)}"
                )
        for name in sent:
            if name.removesuffix(SCALE) not in self.tensors and name not in optional:
                raise SyncError(f"weight plan {plan.hash} has tensor {name!r}, unknown to {self.path}")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise EngineError(f"{path} is not JSON: {error}") from None
    return content


def _eos_ids(config: dict[str, Any]) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


def _read_headers(folder: Path) -> dict[str, tuple[int, ...]] | None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("pytorch_model*.bin")):
            return None
        raise EngineError(
            f"model.path={folder}: no weights (*.safetensors) there; copy the whole model folder"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EngineError(
                f"{file} cannot be read as safetensors: {error}; copy the model again"
            ) from None
    return shapes


def context_limit(cfg: Config, folder: ModelFolder) -> int:
    """Tokens of prompt and response together that the engine accepts.

    model.max_model_len, else the longest prompt plus the longest response. EngineError above



    the model's limit.
    """
    limit = cfg.model.max_model_len or cfg.data.max_prompt_length + cfg.data.max_response_length
    if limit > folder.max_positions:
        key = (
            f"model.max_model_len={limit}"
            if cfg.model.max_model_len
            else f"data.max_prompt_length={cfg.data.max_prompt_length} + "
            f"data.max_response_length={cfg.data.max_response_length}"
        )
        raise EngineError(
            f"{key} exceeds the model's limit of {folder.max_positions} positions "
            f"(max_position_embeddings of {folder.path}); lower it"
        )
    return limit
