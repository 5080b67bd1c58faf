"""Rewards that users might write, the broken ones included (loaded by test_pool.py)."""

import os
import time


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "raise":
        raise ValueError("the user's bug")
    if solution_str == "exit":
        raise SystemExit(3)
    if solution_str == "die":
        os._exit(3)
    if solution_str == "hang":
        time.sleep(3600)
    if solution_str == "big":
        return 7
    return {"score": float(solution_str == ground_truth), "length": len(solution_str), "pid": os.getpid()}


def trl(prompts, completions, ground_truth, hint=None, **columns):
    texts = [c[0]["content"] for c in completions]
    assert set(columns) == {"data_source", "task"} and len(prompts) == len(texts)
    if "hang" in texts:
        time.sleep(3600)
    if "raise" in texts:
        raise ValueError("the user's bug")
    return [None if t == "none" else float(t == g) for t, g in zip(texts, ground_truth, strict=True)]
