"""Which cases run at which world size: (name, function of worker.py, arguments)."""

from __future__ import annotations

from typing import Any


Case = tuple[str, str, dict[str, Any]]

# name -> world size, model, (tensor, pipeline, expert, expert tensor[, virtual pipeline])
LAYOUTS: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "dense TP1": (1, "dense", (1, 1, 1, 1)),
    "dense TP2": (2, "dense", (2, 1, 1, 1)),
    "dense PP2": (2, "dense", (1, 2, 1, 1)),
    "dense DP2": (2, "dense", (1, 1, 1, 1)),
    "dense TP2xPP2": (4, "dense", (2, 2, 1, 1)),
    "tied TP1": (1, "tied", (1, 1, 1, 1)),
    "tied PP2": (2, "tied", (1, 2, 1, 1)),
    "odd vocabulary TP2": (2, "odd", (2, 1, 1, 1)),
    "llama3 positions TP1": (1, "llama3", (1, 1, 1, 1)),
    "MoE TP1": (1, "moe", (1, 1, 1, 1)),
    "MoE TP2xETP2": (2, "moe", (2, 1, 1, 2)),
    "MoE PP2": (2, "moe", (1, 2, 1, 1)),
    "MoE EP2": (2, "moe", (1, 1, 2, 1)),
    "MoE TP2xEP2": (4, "moe", (2, 1, 2, 1)),
    "dense PP2xVPP2": (2, "dense", (1, 2, 1, 1, 2)),
    "tied PP2xVPP2": (2, "tied", (1, 2, 1, 1, 2)),
    "MoE PP2xVPP2": (2, "moe", (1, 2, 1, 1, 2)),
    "MoE PP2xEP2": (4, "moe", (1, 2, 2, 1)),
    "MoE TP2xPP2xEP2": (4, "moe", (2, 2, 2, 1)),
    "MoE PP2xVPP2xEP2": (4, "moe", (1, 2, 2, 1, 2)),
    "MoE TP2xETP2 DP2": (4, "moe", (2, 1, 1, 2)),
}
# Other ways to cut the same batch: name -> (layout, options). The budget is in tokens per micro-batch.
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one micro-batch": ("dense TP1", {"budget": 400}),
    "small micro-batches": ("dense TP1", {"budget": 33}),
    "no prefix sharing": ("dense TP1", {"budget": 64, "sharing": False}),
    "reference head": ("dense TP1", {"head": "reference"}),
    "recomputation": ("dense TP1", {"recompute": "full"}),
    "more ranks than micro-batches": ("dense DP2", {"budget": 400}),
    "MoE, one micro-batch": ("MoE TP1", {"budget": 400}),
    "MoE, no prefix sharing": ("MoE EP2", {"budget": 64, "sharing": False}),
    "MoE, recomputation": ("MoE EP2", {"recompute": "full"}),
    "selective recomputation": ("dense TP1", {"recompute": "selective"}),
    "virtual stages, micro-batches not a multiple": ("dense PP2xVPP2", {"budget": 64}),
    "virtual stages, recomputation": ("MoE PP2xVPP2xEP2", {"recompute": "full"}),
}
TRAINED = (
    "dense TP1", "dense PP2", "tied PP2", "odd vocabulary TP2", "MoE EP2", "MoE TP2xEP2", "MoE TP2xETP2",
    "tied PP2xVPP2", "MoE PP2xVPP2xEP2", "MoE TP2xPP2xEP2",
)  # fmt: skip
EXPORTED = (
    "MoE PP2xVPP2",
    "tied TP1",
    "tied PP2",
    "odd vocabulary TP2",
    "MoE TP2xETP2",
    "MoE PP2",
    "MoE TP2xEP2",
)
# (saved at, loaded at); both layouts have the same world size
CHECKPOINTS = (
    ("MoE TP2xEP2", "MoE TP2xEP2"), ("MoE TP2xEP2", "MoE PP2"), ("dense DP2", "dense PP2"),
    ("MoE TP2xEP2", "MoE PP2xEP2"), ("MoE TP2xEP2", "MoE TP1"), ("MoE TP2xEP2", "MoE PP2xVPP2xEP2"),
)  # fmt: skip


def _cases(world: int) -> list[Case]:
    cases: list[Case] = []
    for name, (size, kind, layout) in LAYOUTS.items():
        if size == world:
            where = {"kind": kind, "layout": layout}
            cases += [(f"parity {name}", "parity", where), (f"gradients {name}", "gradients", where)]
            if name in TRAINED:
                cases.append((f"train {name}", "train", where))
            if name in EXPORTED:
                cases += [(f"export {name}", "export", where), (f"publish {name}", "publish", where)]
    for name, (layout, options) in CUTS.items():
        size, kind, sizes = LAYOUTS[layout]
        if size == world:
            cases.append((f"gradients {name}", "gradients", {"kind": kind, "layout": sizes, **options}))
    for saved, loaded in CHECKPOINTS:
        size, kind, sizes = LAYOUTS[saved]
        if size == world:
            arguments = {"kind": kind, "save_layout": sizes, "load_layout": LAYOUTS[loaded][2]}
            cases.append((f"checkpoint {saved} -> {loaded}", "checkpoint", arguments))
    return cases


CASES: dict[int, list[Case]] = {world: _cases(world) for world in (1, 2, 4)}
OTHER_LOSS = {
    "loss": {"type": "dr_grpo", "length": 16, "clip_ratio_high": 0.3},
    "importance": {"level": "token", "mode": "mask", "cap": 0.01},
    "kl": {"coef": 0.2, "estimator": "k2"},
    "entropy_coeff": 0.0,
}
_ONE = {"kind": "dense", "layout": (1, 1, 1, 1)}
CASES[1] += [
    ("parity shifted", "parity", {**_ONE, "shift": 1}),
    ("parity cold", "parity", {**_ONE, "temperature": 0.7}),
    ("heads", "head_parity", _ONE),
    ("heads, other loss", "head_parity", {**_ONE, **OTHER_LOSS}),
    ("kept reference", "kept_reference", _ONE),
    (
        "checkpoint before the first step",
        "checkpoint",
        {"kind": "moe", "save_layout": (1, 1, 1, 1), "load_layout": (1, 1, 1, 1), "steps": 0},
    ),
    ("refusals", "refusals", _ONE),
    ("controls", "controls", _ONE),
    ("replay", "replay", {"kind": "moe", "layout": (1, 1, 1, 1)}),
    ("balanced", "balanced", {"kind": "moe", "layout": (1, 1, 1, 1)}),
    ("balanced wrongly", "balanced", {"kind": "moe", "layout": (1, 1, 1, 1), "sabotage": True}),
    (
        "asynchronous checkpoint",
        "checkpoint",
        {"kind": "moe", "save_layout": (1, 1, 1, 1), "load_layout": (1, 1, 1, 1), "asynchronous": True},
    ),
    *[
        (f"attention {dtype} {form}", "attention", {"dtype": dtype, "varlen": form == "varlen"})
        for dtype in ("float32", "bfloat16")
        for form in ("blocks", "varlen")
    ],
]
CASES[2] += [
    ("heads TP2", "head_parity", {"kind": "odd", "layout": (2, 1, 1, 1)}),
    ("bf16", "bf16", {"kind": "moe", "layout": (1, 1, 2, 1)}),
    ("bf16 tied PP2", "bf16", {"kind": "tied", "layout": (1, 2, 1, 1)}),
]
CASES[4] += [
    ("replay PP2xVPP2xEP2", "replay", {"kind": "moe", "layout": (1, 2, 2, 1, 2)}),
    ("replay TP2xEP2", "replay", {"kind": "moe", "layout": (2, 1, 2, 1)}),
    ("routed TP2xEP2", "routed_gradients", {"kind": "moe", "layout": (2, 1, 2, 1)}),
    (
        "routed PP2xVPP2xEP2",
        "routed_gradients",
        {"kind": "moe", "layout": (1, 2, 2, 1, 2), "recompute": "full"},
    ),
    ("metrics TP2xEP2", "ratio", {"kind": "moe", "layout": (2, 1, 2, 1)}),
    (
        "asynchronous checkpoint TP2xEP2",
        "checkpoint",
        {"kind": "moe", "save_layout": (2, 1, 2, 1), "load_layout": (1, 2, 2, 1), "asynchronous": True},
    ),
]
CASES[2] += [("balanced TP2xETP2", "balanced", {"kind": "moe", "layout": (2, 1, 1, 2)})]
REAL = {
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
}
CASES[1] += [(f"meta {model}", "meta", {"model": model}) for model in REAL]
