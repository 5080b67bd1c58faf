"""The Megatron trainer against Hugging Face and torch's AdamW, at every parallel layout."""

from __future__ import annotations

import pytest
from cases import (
    CHECKPOINTS,
    CUT_OVER,
    CUTS,
    EXPORTED,
    LAYOUTS,
    OVERLAPPED,
    REAL,
    RESHARDED,
    TRAINED,
    checkpoint_ranks,
    marks,
    ranks_of,
)
from ranks import Group

PARITY = 1e-5  # nat
GRADIENT = 1e-5  # |a - b| / |b| of the worst tensor
HEAD = 1e-6  # loss and the gradient of its weight, one head against another
WEIGHT = 1e-5  # after three AdamW steps at lr 1e-3


def at(layouts: dict[str, str]) -> list[object]:
    """(ranks, name) of every test; layouts: name of a test -> layout."""
    where = {name: ranks_of(layout) for name, layout in layouts.items()}
    return [pytest.param(ranks, name, id=name, marks=marks(ranks)) for name, ranks in where.items()]


ALL = at({name: name for name in LAYOUTS})


@pytest.mark.parametrize(("group", "name"), ALL, indirect=["group"])
def test_logprobs_equal_hugging_face(group: Group, name: str) -> None:
    assert group[f"parity {name}"] <= PARITY


@pytest.mark.parametrize(("group", "name"), ALL, indirect=["group"])
def test_gradients_equal_hugging_face(group: Group, name: str) -> None:
    result = group[f"gradients {name}"]
    assert result["microbatches"] > 1 and 0 < result["clipfrac"] < 1
    assert result["loss"] <= 1e-6
    assert result["worst"] <= GRADIENT, result["name"]


CUT_LAYOUTS = at({name: layout for name, (layout, _) in CUTS.items()})


@pytest.mark.parametrize(("group", "name"), CUT_LAYOUTS, indirect=["group"])
def test_the_cut_of_the_batch_does_not_matter(group: Group, name: str) -> None:
    result = group[f"gradients {name}"]
    assert result["loss"] <= 1e-6
    assert result["worst"] <= GRADIENT, result["name"]


STEPS = [
    pytest.param(rank, name, id=name, marks=marks(rank)) for name in TRAINED for rank in (ranks_of(name),)
]


@pytest.mark.parametrize(("group", "name"), STEPS, indirect=["group"])
def test_three_steps_equal_adamw(group: Group, name: str) -> None:
    result = group[f"train {name}"]
    assert result["weights"] <= WEIGHT
    assert result["moved"] > 100 * WEIGHT
    for ours, theirs in zip(result["history"], result["expected"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("group", "name"), at({name: name for name in EXPORTED}), indirect=["group"])
def test_export_is_bit_exact_and_transformers_loads_it(group: Group, name: str) -> None:
    result = group[f"export {name}"]
    assert result["differing"] == [] and result["missing"] == []
    assert "model.safetensors.index.json" in result["files"]
    assert "model.safetensors" in result["single"]
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= set(result["single"])


@pytest.mark.parametrize(("group", "name"), at({name: name for name in EXPORTED}), indirect=["group"])
def test_publish_writes_every_weight(group: Group, name: str) -> None:
    result = group[f"publish {name}"]
    assert result["published"] and result["names"] and result["wrong"] == []
    assert result["buckets"] > 1 and set(result["versions"]) == {7}


@pytest.mark.parametrize(
    ("group", "saved", "loaded"),
    [
        pytest.param(ranks, a, b, id=f"{a} to {b}", marks=marks(ranks))
        for a, b in CHECKPOINTS
        for ranks in (checkpoint_ranks(a, b),)
    ],
    indirect=["group"],
)
def test_a_resumed_run_is_the_uninterrupted_run(group: Group, saved: str, loaded: str) -> None:
    result = group[f"checkpoint {saved} -> {loaded}"]
    assert result["loss"] <= 1e-5
    assert result["weights"] <= WEIGHT


@pytest.mark.parametrize(
    ("saved", "loaded"), [pytest.param(a, b, id=f"{a} to {b}", marks=marks("2_slow")) for a, b in RESHARDED]
)
def test_a_checkpoint_saved_again_at_another_layout_is_the_same(
    world2_slow: Group, saved: str, loaded: str
) -> None:
    """bf16, with fp32 master weights: one optimizer loaded into a chain of two, and the reverse."""
    result = world2_slow[f"resharded {saved} -> {loaded}"]
    assert result["optimizers"] == (2 if "EP2" in loaded else 1)
    assert result["differing"] == [] and result["extra"] == []
    assert len(result["expert_states"]) >= 6 and min(result["expert_states"].values()) > 0
    assert result["dtypes"] == ["torch.float32"] and set(result["steps"]) == {2.0}


def test_a_checkpoint_before_the_first_step(world1: Group) -> None:
    result = world1["checkpoint before the first step"]
    assert result["loss"] <= 1e-5 and result["weights"] <= WEIGHT


@pytest.mark.parametrize("form", ["blocks", "varlen"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_shared_prefix_attention_equals_a_dense_mask(
    world1: Group, dtype: str, bound: float, form: str
) -> None:
    errors = world1[f"attention {dtype} {form}"]
    assert sorted(errors) == ["dk", "dq", "dv", "mask", "out"]
    assert max(errors.values()) <= bound and errors["mask"] == 0, errors


@pytest.mark.parametrize("form", ["blocks", "varlen"])
@pytest.mark.parametrize("size", CUT_OVER)
def test_attention_cut_over_context_ranks_equals_a_dense_mask(world1: Group, size: int, form: str) -> None:
    errors = world1[f"attention {form} CP{size}"]
    assert max(errors.values()) <= 1e-6 and errors["mask"] == 0, errors


@pytest.mark.parametrize("size", CUT_OVER)
def test_context_ranks_attend_equally_and_send_prompts_only(world1: Group, size: int) -> None:
    found = world1[f"shares CP{size}"]
    row = found["row"][0]
    assert found["pairs"] == [row * (row + 1) // 2 // size] * size
    assert found["rows"] == found["prompt"] * size


def test_a_shifted_position_fails_parity(world1: Group) -> None:
    assert world1["parity shifted"] > 1000 * PARITY


def test_temperature_divides_the_logits(world1: Group) -> None:
    assert world1["parity cold"] <= PARITY


@pytest.mark.parametrize(
    ("group", "case"),
    [
        ("1", "heads"),
        ("1", "heads, other loss"),
        ("2", "heads TP2"),
        pytest.param("2_slow", "heads CP2", marks=marks("2_slow")),
    ],
    indirect=["group"],
)
def test_every_head_equals_the_reference_head(group: Group, case: str) -> None:
    """Gradient in the forward, recomputing, fused (interpreter) against autograd and policy_loss.

    The other loss has a k2 term, whose slope is a small difference of log-probabilities: twice the bound.
    """
    results = group[case]
    assert len(results) == 3
    for name, result in results.items():
        assert result["loss"] <= HEAD and result["own"] <= (2 * HEAD if "other" in case else HEAD), name
        assert result["all"] <= 2 * HEAD and result["metrics"] <= 2 * HEAD, name
        assert result["worst"] <= GRADIENT, name


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks("2_slow")) for name in OVERLAPPED])
def test_three_steps_with_overlapped_collectives_equal_adamw(world2_slow: Group, name: str) -> None:
    result = world2_slow[f"train {name}, overlapped"]
    assert result["weights"] <= WEIGHT and result["moved"] > 100 * WEIGHT


def test_keys_for_cuda_set_megatrons_fields(world1: Group) -> None:
    found = world1["options"]
    assert found["delayed"] == ["hybrid", "delayed", 128]
    assert found["tensorwise"] == ["hybrid", "tensorwise", 128]
    assert found["blockwise"] == ["e4m3", "blockwise", 128]
    assert found["alltoall"][::2] == ["alltoall", True]
    assert found["deepep"] == ["flex", "deepep", True] and found["hybridep"] == ["flex", "hybridep", True]
    assert found["optimizer"] == {
        "use_precision_aware_optimizer": "True",
        "exp_avg_dtype": "torch.bfloat16",
        "exp_avg_sq_dtype": "torch.bfloat16",
        "optimizer_cpu_offload": "True",
        "optimizer_offload_fraction": "0.25",
        "overlap_cpu_optimizer_d2h_h2d": "True",
    }
    assert all(
        word in line for word, line in zip(("fp8", "precision", "deep_ep"), found["missing"], strict=True)
    )
    assert found["nothing missing"] == [] and found["unknown"] == []


@pytest.mark.parametrize(
    ("group", "case"),
    [
        ("1", "kept reference"),
        pytest.param("2_slow", "kept reference, overlapped", marks=marks("2_slow")),
    ],
    indirect=["group"],
)
def test_the_reference_policy_keeps_the_initial_weights(group: Group, case: str) -> None:
    result = group[case]
    assert result["reference"] == 0.0
    assert result["actor"] > 1e-3
    assert result["kl"] == 0.0  # at the first step actor and reference are the same


@pytest.mark.parametrize("case", ["bf16", "bf16 tied PP2"])
def test_bf16_trains_close_to_fp32(world2: Group, case: str) -> None:
    result = world2[case]
    assert result["dtype"] == ["torch.bfloat16"]
    assert 1e-4 < result["logprobs"] < 0.5
    expected = world2["train MoE EP2" if case == "bf16" else "train tied PP2"]["expected"]
    for norm, (_, theirs) in zip(result["norms"], expected, strict=True):
        assert norm == pytest.approx(theirs, rel=0.15)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nonfinite", ("loss", "not applied")),
        ("reference", ("algorithm.kl.coef",)),
        ("unwritable", ("cannot save", "checkpoint")),
        ("unexportable", ("cannot export", "model")),
        ("unloadable", ("redone.json",)),
        ("full", ("cannot save", "full", "File too large")),
        ("full_export", ("cannot export", "full_model", "File too large")),
        ("missing", ("missing", "model.layers.1.self_attn.o_proj.weight")),
        ("misshapen", ("model.layers.1.self_attn.o_proj.weight", "(63, 128)", "(64, 128)")),
        ("unknown", ("q_proj.bias",)),
        ("no_weights", ("no weights", "model.safetensors")),
    ],
)
def test_refusals_name_what_is_wrong(world1: Group, what: str, words: tuple[str, ...]) -> None:
    message = world1["refusals"][what]
    assert all(word in message for word in words), message


def test_a_failed_export_leaves_nothing(world1: Group) -> None:
    assert world1["refusals"]["leftovers"] == "[]"


def test_a_refused_step_changes_nothing(world1: Group) -> None:
    assert world1["refusals"]["unchanged"] == "True"


@pytest.mark.parametrize("model", REAL)
def test_real_models_have_the_published_size(world1: Group, model: str) -> None:
    """The modules that train, on the meta device."""
    found = world1[f"meta {model}"]
    assert found["parameters"] == REAL[model] and found["device"] == ["meta"]
    assert found["missing"] == [] and found["misshapen"] == []
