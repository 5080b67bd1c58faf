"""One GRPO step after another in TRL's GRPOTrainer, each when told to: runs in TRL's own environment.

Reads the work from the JSON file it is given (run.py's `prepare`); then, per line "step" on stdin, makes one
step and prints lines "PEER {json}".
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def say(**values: Any) -> None:
    sys.stdout.write("PEER " + json.dumps(values) + "\n")
    sys.stdout.flush()


class Stepper(TrainerCallback):
    """Waits for the word before a step, says how long it took behind it: generation, loss, optimizer."""

    def __init__(self) -> None:
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(ready=True)
        if sys.stdin.readline().strip() != "step":
            raise SystemExit(0)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say(seconds=time.perf_counter() - self.began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        say(log={k: v for k, v in logs.items() if isinstance(v, int | float)})


def reward(completions: list[Any], label: list[str], **_: Any) -> list[float]:
    """1 where the answer is the label, as redone's exact reward."""
    answers = [c[0]["content"].strip().strip(".").casefold() for c in completions]
    return [float(a == b.casefold()) for a, b in zip(answers, label, strict=True)]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        work = json.load(file)
    torch.set_num_threads(work["threads"])
    with open(work["data"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    batch = work["prompts"] * work["samples"]
    accumulate = batch // work["micro_batch"]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=accumulate,
        steps_per_generation=accumulate,  # one generation, one update: no old log-probability pass
        num_iterations=1,
        num_generations=work["samples"],
        max_completion_length=work["response_tokens"],
        generation_kwargs={"min_new_tokens": work["response_tokens"]},
        temperature=work["temperature"],
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        max_steps=work["steps"],
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = GRPOTrainer(
        model=work["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"], "label": r["label"]} for r in rows]),
        processing_class=tokenizer,
        callbacks=[Stepper()],
    )
    texts = [
        tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows
    ]
    counts = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    names = ("trl", "torch", "transformers", "accelerate")
    say(
        prompt_tokens=counts,
        versions={name: importlib.metadata.version(name) for name in names},
        threads=torch.get_num_threads(),
    )
    trainer.train()


if __name__ == "__main__":
    main()
