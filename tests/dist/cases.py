"""Which cases run at which world size: (name, function of worker.py, arguments)."""

from __future__ import annotations

from typing import Any

import pytest

Case = tuple[str, str, dict[str, Any]]

# name -> world size, model, (tensor, pipeline, expert, expert tensor[, virtual pipeline[, context]])
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
    "dense CP2": (2, "dense", (1, 1, 1, 1, 1, 2)),
    "MoE CP2": (2, "moe", (1, 1, 1, 1, 1, 2)),
    "MoE CP2xEP2": (2, "moe", (1, 1, 2, 1, 1, 2)),
    "dense CP2xTP2": (4, "dense", (2, 1, 1, 1, 1, 2)),
    "dense CP2xPP2": (4, "dense", (1, 2, 1, 1, 1, 2)),
    "dense CP2xDP2": (4, "dense", (1, 1, 1, 1, 1, 2)),
    "MoE CP2xTP2xETP2": (4, "moe", (2, 1, 1, 2, 1, 2)),
    "MoE CP2xPP2xEP2": (4, "moe", (1, 2, 2, 1, 1, 2)),
    "MoE CP2xTP2xEP4": (4, "moe", (2, 1, 4, 1, 1, 2)),
    "MoE CP2xPP2xVPP2xEP2": (4, "moe", (1, 2, 2, 1, 2, 2)),
}
# They run on ranks of their own, in make test-full.
SLOW = {name for name in LAYOUTS if "CP2" in name} - {"dense CP2", "MoE CP2xEP2"}
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
    "CP, one micro-batch": ("MoE CP2", {"budget": 400}),
    "CP, no prefix sharing": ("MoE CP2", {"budget": 64, "sharing": False}),
    "CP, small micro-batches": ("MoE CP2", {"budget": 33, "recompute": "selective"}),
    "CP, recomputation": ("MoE CP2xTP2xEP4", {"budget": 400, "recompute": "full"}),
    "CP, DP, no prefix sharing": ("dense CP2xDP2", {"budget": 64, "sharing": False}),
}
TRAINED = (
    "dense TP1", "dense PP2", "tied PP2", "odd vocabulary TP2", "MoE EP2", "MoE TP2xEP2", "MoE TP2xETP2",
    "tied PP2xVPP2", "MoE PP2xVPP2xEP2", "MoE TP2xPP2xEP2", "dense CP2", "MoE CP2xEP2", "dense CP2xTP2",
    "dense CP2xPP2", "MoE CP2xTP2xETP2", "MoE CP2xPP2xEP2", "MoE CP2xTP2xEP4",
)  # fmt: skip
EXPORTED = (
    "MoE PP2xVPP2",
    "tied TP1",
    "tied PP2",
    "odd vocabulary TP2",
    "MoE TP2xETP2",
    "MoE PP2",
    "MoE TP2xEP2",
    "MoE CP2xTP2xEP4",
)
# (saved at, loaded at), on the ranks of the larger layout: "MoE TP1" on four ranks is DP4
SLOW_CHECKPOINTS = (
    ("MoE TP1", "MoE EP2"), ("MoE EP2", "MoE TP1"), ("MoE TP2xETP2", "MoE EP2"),
)  # fmt: skip
CHECKPOINTS = (
    ("MoE TP2xEP2", "MoE TP2xEP2"), ("MoE TP2xEP2", "MoE PP2"), ("dense DP2", "dense PP2"),
    ("MoE TP2xEP2", "MoE PP2xEP2"), ("MoE TP2xEP2", "MoE TP1"), ("MoE TP2xEP2", "MoE PP2xVPP2xEP2"),
    ("MoE CP2", "MoE PP2"), ("MoE CP2xTP2xEP4", "MoE TP2xEP2"), ("MoE CP2xTP2xEP4", "MoE CP2xPP2xEP2"),
    ("MoE PP2", "MoE EP2"), ("MoE EP2", "MoE PP2"), ("MoE TP1", "MoE TP2xEP2"),
    *SLOW_CHECKPOINTS,
)  # fmt: skip


def ranks_of(layout: str) -> str:
    """Which ranks run the layout's cases: "2", or "2_slow"."""
    return f"{LAYOUTS[layout][0]}_slow" if layout in SLOW else str(LAYOUTS[layout][0])


def checkpoint_ranks(saved: str, loaded: str) -> str:
    """Checkpoints on four ranks cost ten seconds each: `make test` has one of them, "4_long" the others."""
    if (saved, loaded) in SLOW_CHECKPOINTS:
        return "2_slow"
    ranks = ranks_of(max(saved, loaded, key=lambda layout: LAYOUTS[layout][0]))
    return "4_long" if ranks == "4" and loaded != "MoE PP2xEP2" else ranks


def _cases(ranks: str) -> list[Case]:
    cases: list[Case] = []
    for name, (_, kind, layout) in LAYOUTS.items():
        if ranks_of(name) == ranks:
            where = {"kind": kind, "layout": layout}
            cases += [(f"parity {name}", "parity", where), (f"gradients {name}", "gradients", where)]
            if name in TRAINED:
                cases.append((f"train {name}", "train", where))
            if name in EXPORTED:
                cases += [(f"export {name}", "export", where), (f"publish {name}", "publish", where)]
    for name, (layout, options) in CUTS.items():
        _, kind, sizes = LAYOUTS[layout]
        if ranks_of(layout) == ranks:
            cases.append((f"gradients {name}", "gradients", {"kind": kind, "layout": sizes, **options}))
    for saved, loaded in CHECKPOINTS:
        _, kind, sizes = LAYOUTS[saved]
        if checkpoint_ranks(saved, loaded) == ranks:
            arguments = {"kind": kind, "save_layout": sizes, "load_layout": LAYOUTS[loaded][2]}
            cases.append((f"checkpoint {saved} -> {loaded}", "checkpoint", arguments))
    return cases


CASES: dict[str, list[Case]] = {
    ranks: _cases(ranks) for ranks in ("1", "2", "4", "4_long", "2_slow", "4_slow")
}
CUT_OVER = (2, 3, 8)  # context ranks, one process in place of all
OTHER_LOSS = {
    "loss": {"type": "dr_grpo", "length": 16, "clip_ratio_high": 0.3},
    "importance": {"level": "token", "mode": "mask", "cap": 0.01},
    "kl": {"coef": 0.2, "estimator": "k2"},
    "entropy_coeff": 0.0,
}
_ONE = {"kind": "dense", "layout": (1, 1, 1, 1)}
CASES["1"] += [
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
    ("options", "options", {}),
    *[(f"shares CP{size}", "context_shares", {"size": size}) for size in CUT_OVER],
    ("controls", "controls", _ONE),
    ("replay", "replay", {"kind": "moe", "layout": (1, 1, 1, 1)}),
    ("balanced", "balanced", {"kind": "moe", "layout": (1, 1, 1, 1)}),
    ("supervised", "sft_sharing", {"kind": "moe", "layout": (1, 1, 1, 1)}),
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
    *[
        (
            f"attention {form} CP{size}",
            "attention",
            {"dtype": "float32", "varlen": form == "varlen"} | {"size": size},
        )
        for form in ("blocks", "varlen")
        for size in CUT_OVER
    ],
]
CASES["2"] += [
    ("heads TP2", "head_parity", {"kind": "odd", "layout": (2, 1, 1, 1)}),
    ("bf16", "bf16", {"kind": "moe", "layout": (1, 1, 2, 1)}),
    ("bf16 tied PP2", "bf16", {"kind": "tied", "layout": (1, 2, 1, 1)}),
]
ASLEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 EP2": ("2_slow", {"kind": "moe", "layout": (1, 1, 2, 1)}),
    "bf16 EP2": ("2", {"kind": "moe", "layout": (1, 1, 2, 1), "dtype": "bfloat16"}),
    "bf16 tied PP2": ("2_slow", {"kind": "tied", "layout": (1, 2, 1, 1), "dtype": "bfloat16"}),
}
for _name, (_ranks, _where) in ASLEEP.items():
    CASES[_ranks].append((f"sleeping {_name}", "sleeping", _where))
CASES["4_long"] += [
    ("replay PP2xVPP2xEP2", "replay", {"kind": "moe", "layout": (1, 2, 2, 1, 2)}),
    ("routed TP2xEP2", "routed_gradients", {"kind": "moe", "layout": (2, 1, 2, 1)}),
    (
        "routed PP2xVPP2xEP2",
        "routed_gradients",
        {"kind": "moe", "layout": (1, 2, 2, 1, 2), "recompute": "full"},
    ),
    (
        "asynchronous checkpoint TP2xEP2",
        "checkpoint",
        {"kind": "moe", "save_layout": (2, 1, 2, 1), "load_layout": (1, 2, 2, 1), "asynchronous": True},
    ),
]
CASES["4"] += [
    ("replay TP2xEP2", "replay", {"kind": "moe", "layout": (2, 1, 2, 1)}),
    ("metrics TP2xEP2", "ratio", {"kind": "moe", "layout": (2, 1, 2, 1)}),
]
CASES["2"] += [("balanced TP2xETP2", "balanced", {"kind": "moe", "layout": (2, 1, 1, 2)})]
_CP2, _CP2EP2, _CP2TP2EP4 = (LAYOUTS[name][2] for name in ("MoE CP2", "MoE CP2xEP2", "MoE CP2xTP2xEP4"))
_GSPO = {
    "loss": {"type": "gspo", "clip_ratio_low": 0.3, "clip_ratio_high": 0.3},
    "importance": {"level": "sequence", "mode": "truncate", "cap": 2.0},
}
_BALANCED = {"moe": {"load_balancing": "aux_loss", "aux_loss_coeff": 0.1}, "budget": 400}
CASES["2_slow"] += [
    ("heads CP2", "head_parity", {"kind": "dense", "layout": LAYOUTS["dense CP2"][2]}),
    ("replay CP2xEP2", "replay", {"kind": "moe", "layout": _CP2EP2}),
    ("balanced CP2", "balanced", {"kind": "moe", "layout": _CP2}),
    ("sequence loss CP2", "two_layouts", {"kind": "dense", "layouts": (_CP2, (2, 1, 1, 1)), "change": _GSPO}),
    ("balancing loss CP2", "two_layouts", {"kind": "moe", "layouts": (_CP2, (2, 1, 1, 2)), **_BALANCED}),
]
RESHARDED = (("MoE PP2", "MoE EP2"), ("MoE EP2", "MoE PP2"))
CASES["2_slow"] += [
    (
        f"resharded {saved} -> {loaded}",
        "resharded",
        {
            "kind": "moe",
            "save_layout": LAYOUTS[saved][2],
            "load_layout": LAYOUTS[loaded][2],
            "dtype": "bfloat16",
        },
    )
    for saved, loaded in RESHARDED
]
OVERLAP = {"optim": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
OVERLAPPED = ("dense DP2", "MoE EP2", "tied PP2xVPP2", "MoE CP2xEP2")
CASES["2_slow"] += [
    (f"train {name}, overlapped", "train", {"kind": LAYOUTS[name][1], "layout": LAYOUTS[name][2], **OVERLAP})
    for name in OVERLAPPED
]
CASES["2_slow"] += [
    ("kept reference, overlapped", "kept_reference", {"kind": "dense", "layout": (1, 1, 1, 1), **OVERLAP}),
]
CASES["4_slow"] += [
    ("replay CP2xTP2xEP4", "replay", {"kind": "moe", "layout": _CP2TP2EP4}),
    ("routed CP2xTP2xEP4", "routed_gradients", {"kind": "moe", "layout": _CP2TP2EP4, "recompute": "full"}),
    ("metrics CP2xTP2xEP4", "ratio", {"kind": "moe", "layout": _CP2TP2EP4}),
]
REAL = {
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
}
CASES["1"] += [(f"meta {model}", "meta", {"model": model}) for model in REAL]


def marks(ranks: str) -> list[pytest.MarkDecorator]:
    """Of a test on these ranks: the group "_long" runs in make test-full, "_slow" in make test-extra."""
    return [pytest.mark.slow] * ("_" in ranks) + [pytest.mark.extra] * ranks.endswith("_slow")
