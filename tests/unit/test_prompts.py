from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redone.config.schema import Config, DataConfig, ExactReward, ModelSection
from redone.data.chat import Chat, load_chat
from redone.data.prompts import load_prompts
from redone.data.tiny import make_tiny_tokenizer
from redone.errors import DataError

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def verl(**changes) -> dict:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": MESSAGES,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0},
    }
    return {**row, **changes}


def config(*rewards: str, **data) -> Config:
    return Config(
        model=ModelSection(path="x"),
        data=DataConfig(train=(), **data),
        rewards={key: ExactReward() for key in rewards or ("default",)},
    )


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    path = tmp_path_factory.mktemp("model")
    make_tiny_tokenizer(path)
    return load_chat(ModelSection(path=str(path)))


def parquet(path: Path, *rows: dict) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_verl_parquet_loads_unchanged(tmp_path, chat):
    (prompt,) = load_prompts([parquet(tmp_path / "a.parquet", verl())], config(), chat).prompts
    assert (prompt.task, prompt.data_source, prompt.domain) == ("openai/gsm8k", "openai/gsm8k", "sns")
    assert (prompt.reference, prompt.reward) == ("72", "default")
    assert prompt.extra == {"split": "train", "index": 0}
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert prompt.token_ids.tolist() == chat.prompt_ids(prompt.messages).tolist()


def test_slime_jsonl_loads_unchanged(tmp_path, chat):
    file = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "what?", "label": "42", "metadata": {"difficulty": 3}},
        "",
        {"prompt": MESSAGES, "label": 7, "task": "math", "domain": "general"},
    )
    first, second = load_prompts([file], config("default", "math"), chat).prompts
    assert [(m.role, m.content) for m in first.messages] == [("user", "what?")]
    assert (first.reference, first.reward, first.extra) == ("42", "default", {"difficulty": 3})
    assert (second.reference, second.task, second.reward, second.domain) == (7, "math", "math", "general")


def test_a_task_has_its_own_longest_response(tmp_path, chat):
    rows = [{"prompt": "q", "label": "x", "task": task} for task in ("label", "essay")]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    cfg = config(task_max_response_length={"label": 4})
    assert [p.max_tokens for p in load_prompts([file], cfg, chat).prompts] == [4, None]


def test_other_column_names(tmp_path, chat):
    file = jsonl(tmp_path / "a.jsonl", {"question": "what?", "answer": "42"})
    cfg = config(prompt_key="question", label_key="answer")
    assert load_prompts([file], cfg, chat).prompts[0].reference == "42"


def test_reward_key_is_task_then_source_then_default(tmp_path, chat):
    file = parquet(tmp_path / "a.parquet", verl(task="sums"))

    def key(*rewards: str) -> str:
        return load_prompts([file], config(*rewards), chat).prompts[0].reward

    assert key("sums", "openai/gsm8k", "default") == "sums"
    assert key("openai/gsm8k", "default") == "openai/gsm8k"
    assert key("default") == "default"
    with pytest.raises(DataError, match=r"a\.parquet, row 0: .*add rewards\.sums"):
        key("other")


def test_ids_depend_on_content_only(tmp_path, chat):
    rows = [verl(), verl(prompt=[{"role": "user", "content": "v"}]), verl()]
    ids = [p.id for p in load_prompts([parquet(tmp_path / "a.parquet", *rows)], config(), chat).prompts]
    assert len(set(ids)) == 3
    moved = [parquet(tmp_path / f"{i}.parquet", row) for i, row in enumerate(reversed(rows))]
    assert [p.id for p in load_prompts(moved, config(), chat).prompts] == [ids[0], ids[1], ids[2]]
    changed = [
        verl(reward_model={"style": "rule", "ground_truth": "73"}),
        verl(task="other"),
        verl(prompt=MESSAGES[1:]),
    ]
    other = [
        p.id
        for i, row in enumerate(changed)
        for p in load_prompts([parquet(tmp_path / f"c{i}.parquet", row)], config(), chat).prompts
    ]
    assert not set(other) & set(ids)
    moved_index = verl(extra_info={"split": "x", "index": 9})
    (same,) = load_prompts([parquet(tmp_path / "m.parquet", moved_index)], config(), chat).prompts
    assert same.id == ids[0]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"label": "x"}, "no column 'prompt'"),
        ({"prompt": "q"}, "no ground truth"),
        (verl(reward_model={"style": "rule"}), "no ground truth"),
        ({"prompt": [], "label": "x"}, "list of messages"),
        ({"prompt": 5, "label": "x"}, "list of messages"),
        ({"prompt": [{"role": "boss", "content": "q"}], "label": "x"}, r"prompt\[0\] must have a role"),
        ({"prompt": [{"role": "user", "content": None}], "label": "x"}, r"prompt\[0\]"),
        ({"prompt": [{"role": "assistant", "content": "q"}], "label": "x"}, "end with a user message"),
        ({"prompt": "q", "label": "x", "domain": "medical"}, "domain='medical'"),
        ({"prompt": "q", "label": "x", "extra_info": [1]}, "extra_info"),
        ("{not json", "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, chat, row, complaint):
    good = {"prompt": "q", "label": "x"}
    file = jsonl(tmp_path / "bad.jsonl", good, row, good)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{complaint}"):
        load_prompts([file], config(), chat)


def test_unreadable_files_are_named(tmp_path, chat):
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        load_prompts([str(tmp_path / "none.parquet")], config(), chat)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"torn\.parquet: not a readable parquet"):
        load_prompts([str(tmp_path / "torn.parquet")], config(), chat)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"end in \.parquet or \.jsonl"):
        load_prompts([str(tmp_path / "a.csv")], config(), chat)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_prompts([str(tmp_path / "latin.jsonl")], config(), chat)
    with pytest.raises(DataError, match="no usable prompt"):
        load_prompts([jsonl(tmp_path / "empty.jsonl")], config(), chat)


def test_long_prompts_stop_or_are_counted(tmp_path, chat):
    rows = [{"prompt": "q" * n, "label": "x"} for n in (5, 50, 6, 60)]
    file = jsonl(tmp_path / "a.jsonl", *rows)
    length = len(load_prompts([file], config(), chat).prompts[0].token_ids)
    with pytest.raises(DataError, match=rf"line 2: the prompt has {length + 45} tokens, .*=drop"):
        load_prompts([file], config(max_prompt_length=length + 1), chat)
    kept = load_prompts([file], config(max_prompt_length=length + 1, truncation="drop"), chat)
    assert [len(p.messages[0].content) for p in kept.prompts] == [5, 6]
    assert kept.too_long == 2
    with pytest.raises(DataError, match="4 were too long"):
        load_prompts([file], config(max_prompt_length=3, truncation="drop"), chat)


def test_more_rows_than_one_tokenizer_call(tmp_path, chat):
    file = jsonl(tmp_path / "a.jsonl", *({"prompt": str(i), "label": "x"} for i in range(1500)))
    prompts = load_prompts([file], config(), chat).prompts
    assert [p.messages[0].content for p in prompts] == [str(i) for i in range(1500)]
    assert prompts[1400].token_ids.tolist() == chat.prompt_ids(prompts[1400].messages).tolist()
