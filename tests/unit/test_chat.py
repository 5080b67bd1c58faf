"""Exact token ids: templates, stop ids, SFT masks; the tiny tokenizer with templates of real families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from redone.config.schema import ModelSection
from redone.data.chat import Chat, load_chat
from redone.data.tiny import make_tiny_tokenizer
from redone.errors import DataError, ModelError
from redone.types import Message

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's way with thinking: an empty block closes the generation prompt when it is off, the last answer gets
# one, answers of the history get none
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

USER = Message(role="user", content="hi")
TALK = (
    Message(role="system", content="be brief"),
    Message(role="user", content="1+1"),
    Message(role="assistant", content="two"),
    Message(role="user", content="2+2"),
    Message(role="assistant", content="4 ok"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder without weights."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": 128, "eos_token_id": 1}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    return path


def chat_with(folder: Path, tmp_path: Path, template: str, **options) -> Chat:
    (tmp_path / "chat.jinja").write_text(template)
    return load_chat(ModelSection(path=str(folder), chat_template=str(tmp_path / "chat.jinja"), **options))


def text_of(chat: Chat, ids) -> str:
    return "".join(chat.tokenizer.convert_ids_to_tokens([int(i) for i in ids]))


def test_prompt_ids_are_the_templates_text(folder):
    chat = load_chat(ModelSection(path=str(folder)))
    ids = chat.prompt_ids([USER])
    assert ids.dtype == "int32"
    assert text_of(chat, ids) == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    assert (ids[0], (ids == 1).sum()) == (2, 1)
    assert chat.vocab_size == 100
    assert [x.tolist() for x in chat.prompt_ids_batch([[USER], TALK[:2]])] == [
        ids.tolist(),
        chat.prompt_ids(TALK[:2]).tolist(),
    ]


def test_system_prompt_only_where_there_is_none(folder, tmp_path):
    chat = chat_with(folder, tmp_path, SMOLLM2, system_prompt="from config")
    assert "system\nfrom config<" in text_of(chat, chat.prompt_ids([USER]))
    assert "from config" not in text_of(chat, chat.prompt_ids(TALK[:2]))
    default = chat_with(folder, tmp_path, SMOLLM2)
    assert "named SmolLM" in text_of(default, default.prompt_ids([USER]))


def test_enable_thinking_reaches_the_template(folder, tmp_path):
    texts = {}
    for value in (None, True, False):
        chat = chat_with(folder, tmp_path, THINKING, enable_thinking=value)
        texts[value] = text_of(chat, chat.prompt_ids([USER]))
    assert texts[None] == texts[True] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[False] == texts[True] + "<think>\n\n</think>\n\n"


def test_stop_ids_are_the_union(folder, tmp_path):
    assert load_chat(ModelSection(path=str(folder))).stop_token_ids == (0, 1)
    other = tmp_path / "other"
    make_tiny_tokenizer(other)
    (other / "config.json").write_text(json.dumps({"vocab_size": 128}))
    # nothing is configured: the template's end of turn remains
    assert load_chat(ModelSection(path=str(other))).stop_token_ids == (1,)
    (other / "config.json").write_text(json.dumps({"vocab_size": 128, "eos_token_id": 0}))
    assert load_chat(ModelSection(path=str(other))).stop_token_ids == (0, 1)


def test_bos_is_never_doubled(tmp_path):
    """A tokenizer that adds BOS by itself, and a template that writes it too (Llama 3)."""
    from transformers import PreTrainedTokenizerFast

    chars = ["<s>", "</s>", "�", *(chr(c) for c in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token="�"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = BOS
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 128, "eos_token_id": 1}))
    assert fast("a")["input_ids"][0] == 0  # the trap is armed
    chat = load_chat(ModelSection(path=str(tmp_path)))
    ids = chat.prompt_ids([USER])
    assert (ids == 0).sum() == 1
    assert ids[0] == 0
    ids, mask = chat.sft_tokens([USER, Message(role="assistant", content=" ok ")])
    assert (ids == 0).sum() == 1
    assert text_of(chat, ids[mask]) == "ok</s>"


@pytest.mark.parametrize("template", [None, SMOLLM2], ids=["tiny", "smollm2"])
def test_sft_mask_is_exactly_the_assistants_words(folder, tmp_path, template):
    section = ModelSection(path=str(folder))
    chat = load_chat(section) if template is None else chat_with(folder, tmp_path, template)
    ids, mask = chat.sft_tokens(TALK)
    assert text_of(chat, ids) == chat.render(TALK, generation_prompt=False)
    assert text_of(chat, ids[mask]) == "two<|im_end|>4 ok<|im_end|>"
    # what is trained follows exactly what generation would have been given
    prompt = chat.prompt_ids(TALK[:-1])
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    first = chat.prompt_ids(TALK[:2])
    assert ids[: len(first)].tolist() == first.tolist()
    assert not mask[: len(first)].any()
    assert mask[len(prompt)]


@pytest.mark.parametrize(("thinking", "trained"), [(None, "<think>\n\n</think>\n\n4 ok"), (False, "4 ok")])
def test_sft_mask_with_a_thinking_template(folder, tmp_path, thinking, trained):
    chat = chat_with(folder, tmp_path, THINKING, enable_thinking=thinking)
    ids, mask = chat.sft_tokens(TALK)
    assert text_of(chat, ids) == chat.render(TALK, generation_prompt=False)
    assert text_of(chat, ids[mask]) == f"two<|im_end|>{trained}<|im_end|>"
    prompt = chat.prompt_ids(TALK[:-1])
    assert ids[: len(prompt)].tolist() == prompt.tolist()


def test_sft_content_that_looks_like_the_template(folder):
    chat = load_chat(ModelSection(path=str(folder)))
    talk = [Message(role="user", content="say two"), Message(role="assistant", content="two"), USER]
    ids, mask = chat.sft_tokens([*talk, Message(role="assistant", content="<|im_start|>assistant\ntwo")])
    assert text_of(chat, ids[mask]) == "two<|im_end|><|im_start|>assistant\ntwo<|im_end|>"


def test_sft_refuses_what_it_cannot_place(folder, tmp_path):
    chat = load_chat(ModelSection(path=str(folder)))
    with pytest.raises(DataError, match="must end with an assistant"):
        chat.sft_tokens([USER])
    shouting = chat_with(
        folder, tmp_path, "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="alters an assistant turn"):
        shouting.sft_tokens([USER, Message(role="assistant", content="ok")])


def test_template_errors_name_the_reason(folder, tmp_path):
    chat = chat_with(
        folder, tmp_path, "{% if messages|length > 2 %}{{ raise_exception('two at most') }}{% endif %}x"
    )
    with pytest.raises(DataError, match="two at most"):
        chat.prompt_ids(TALK)


def test_bad_model_folders(folder, tmp_path):
    with pytest.raises(ModelError, match="tokenizer"):
        load_chat(ModelSection(path=str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="chat_template"):
        load_chat(ModelSection(path=str(folder), chat_template="missing.jinja"))
    small = tmp_path / "small"
    make_tiny_tokenizer(small)
    (small / "config.json").write_text(json.dumps({"vocab_size": 99}))
    with pytest.raises(ModelError, match="ids up to 99, the model 99 embedding rows"):
        load_chat(ModelSection(path=str(small)))
