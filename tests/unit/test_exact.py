from __future__ import annotations

import asyncio

import numpy as np
import pytest

from redone.config.schema import CustomReward, ExactReward
from redone.errors import ConfigError
from redone.reward.extract import last_box
from redone.reward.pool import build_rewards
from redone.types import Completion, Finish, Message, Prompt, Score


def prompt(reference: object, reward: str = "r") -> Prompt:
    return Prompt(
        id="p",
        task="t",
        domain="sns",
        data_source="source",
        messages=(Message(role="user", content="q"),),
        token_ids=np.array([1], dtype=np.int32),
        reference=reference,
        reward=reward,
        extra={"k": 1},
    )


def completion(text: str, finish: Finish = "stop") -> Completion:
    return Completion(
        token_ids=np.array([1], np.int32),
        text=text,
        logprobs=np.zeros(1, np.float32),
        finish=finish,
        versions=(),
    )


def score(config, text: str, reference: object, finish: Finish = "stop") -> Score:
    pool = build_rewards({"r": config})
    (found,) = asyncio.run(pool.score_group(prompt(reference), [completion(text, finish)]))
    pool.close()
    return found


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("Positive.", "positive"),
        (" positive\n", "positive"),
        ("“Positive”！", "positive"),
        ("ＰＯＳＩＴＩＶＥ", "positive"),
        ("【旅行】。", "旅行"),
        ("４２", 42),
        ("true", True),
        ("new   york", "New York"),
        ("B", ["a", "b"]),
        ("Straße", "STRASSE"),
        ("!?", "!?"),
        ("c++", "C"),
    ],
)
def test_equal_after_normalisation(text, reference):
    assert score(ExactReward(), text, reference).raw == 1.0


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("positive negative", "positive"),
        ("", "positive"),
        ("not positive", "positive"),
        ("?", "!"),
        ("4 2", "42"),
    ],
)
def test_different(text, reference):
    found = score(ExactReward(), text, reference)
    assert (found.raw, found.correct, found.status) == (0.0, False, "ok")


def test_switches():
    assert score(ExactReward(ignore_case=False), "Positive", "positive").raw == 0.0
    assert score(ExactReward(strip_punctuation=False), "positive.", "positive").raw == 0.0
    assert score(ExactReward(), "positive", "positive", finish="length").raw == 0.0
    assert score(ExactReward(require_stop=False), "positive", "positive", finish="length").raw == 1.0
    scaled = score(ExactReward(scale=2.0), "a", "a")
    assert (scaled.raw, scaled.value, scaled.correct) == (1.0, 2.0, True)


@pytest.mark.parametrize(
    ("extract", "text", "raw"),
    [
        ("tag", "<answer>no</answer> so <answer>Yes.</answer>", 1.0),
        ("tag", "<answer><answer>yes</answer>", 1.0),
        ("tag", "yes", 0.0),
        ("tag", "<answer>yes", 0.0),
        ("last_line", "thinking...\nyes\n\n", 1.0),
        ("last_line", "yes\nno", 0.0),
        ("last_line", "\n", 0.0),
        ("box", r"so \boxed{no} \boxed{yes}", 1.0),
        ("box", "yes", 0.0),
        ("none", "it is yes", 0.0),
    ],
)
def test_extraction(extract, text, raw):
    assert score(ExactReward(extract=extract), text, "yes").raw == raw


def test_boxes_balance_braces():
    assert last_box(r"\boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_box(r"\boxed{1") is None


def test_a_reference_that_cannot_be_compared_is_a_failure_not_a_zero():
    for reference in ({"target": ["a"]}, None, []):
        assert score(ExactReward(), "a", reference).status == "error"


def custom(tmp_path, body: str, **options) -> CustomReward:
    path = tmp_path / "reward.py"
    path.write_text(body)
    return CustomReward(path=str(path), **options)


def test_custom_gets_verls_arguments(tmp_path):
    body = (
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert (data_source, ground_truth, extra_info) == ('source', 'ref', {'k': 1})\n"
        "    return {'score': len(solution_str) / 10, 'acc': True, 'note': 'x'}\n"
    )
    found = score(custom(tmp_path, body, threshold=0.5), "12345", "ref")
    assert (found.raw, found.correct, dict(found.parts)) == (0.5, True, {"acc": 1.0})
    other = custom(tmp_path, "import numpy as np\ndef mine(**kw): return np.float32(0.25)\n", name="mine")
    assert score(other, "x", "ref").raw == 0.25


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("raise ValueError('broken')", "ValueError: broken"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return next(iter(()))", "StopIteration"),
        ("return float('nan')", "nan"),
        ("return 1.5", "must lie in"),
        ("return -1", "must lie in"),
        ("return 'yes'", "not a number"),
        ("return None", "not a number"),
        ("return {'acc': 1}", "not a number"),
    ],
)
def test_a_failing_custom_reward_is_an_error_and_is_logged(tmp_path, caplog, body, detail):
    found = score(custom(tmp_path, f"def compute_score(**kw):\n    {body}\n"), "x", "ref")
    assert (found.status, found.raw) == ("error", 0.0)
    assert detail in found.detail
    assert "reward.py" in caplog.text


def test_a_custom_file_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        build_rewards({"r": CustomReward(path=str(tmp_path / "none.py"))})
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        build_rewards({"r": custom(tmp_path, "import nothing_of_this_name\n")})
    with pytest.raises(ConfigError, match="no function compute_score"):
        build_rewards({"r": custom(tmp_path, "x = 1\n")})
