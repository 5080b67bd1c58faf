"""Tiny random models with a character tokenizer: the test bed of every part, and of configs/tiny."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["qwen3", "qwen3_moe", "llama"]

PAD, EOS, BOS = "<pad>", "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 128


def make_tiny_tokenizer(path: str | Path) -> None:
    """One token per printable ASCII character; ids 0..2 are pad, eos, bos; 100 of 128 rows are used."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chars = [PAD, EOS, BOS, "\n", *[c for c in string.printable[:95]], "�"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token="�"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token="�"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def make_tiny_model(
    path: str | Path,
    kind: Kind = "qwen3_moe",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> Path:
    """Write a Hugging Face folder with random weights (hidden 64, 4 layers, 8 experts top-2 for the MoE).

    All sizes are multiples of 32, which vLLM's CPU kernels need. `overrides` go to the Hugging Face config.
    """
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    common: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    moe: dict[str, object] = dict(
        moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.0,
    )  # fmt: skip
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(**{**common, **(moe if kind == "qwen3_moe" else {}), **overrides})
    model = model_class(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.3 if "gate.weight" in name else 0.08))
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.to(dtype).save_pretrained(path)
    make_tiny_tokenizer(path)
    return Path(path)
