"""Token ids from messages, exactly as the model folder's chat template writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redone.config.schema import ModelSection
from redone.errors import DataError, ModelError
from redone.types import IntArray, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# stands for a message's content while the text that the template puts around it is found
SENTINEL = "redoneSentinel{}redone"


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the ids that end a response."""

    tokenizer: PreTrainedTokenizerFast
    stop_token_ids: tuple[int, ...]  # ascending, never empty
    system_prompt: str | None = None
    enable_thinking: bool | None = None

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer can produce are below this; the model's rows from here on are padding."""
        return _largest_id(self.tokenizer) + 1

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The template's text. Raises DataError when the template refuses the messages."""
        from jinja2 import TemplateError

        options = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        turns = [{"role": m.role, "content": m.content} for m in self._with_system(messages)]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt, **options
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return str(text)

    def prompt_ids(self, messages: Sequence[Message]) -> IntArray:
        """[P] int32, up to and including the template's generation prompt.

        BOS is the template's business alone: the tokenizer adds none, so it is never doubled.
        """
        return self.prompt_ids_batch([messages])[0]

    def prompt_ids_batch(self, conversations: Sequence[Sequence[Message]]) -> list[IntArray]:
        """prompt_ids of each conversation; one tokenizer call for all, which uses its threads."""
        texts = [self.render(messages, generation_prompt=True) for messages in conversations]
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in found]

    def sft_tokens(self, messages: Sequence[Message]) -> tuple[IntArray, NDArray[np.bool_]]:
        """(ids [T] int32, mask [T] bool): True on what the model must produce, i.e. everything of a trained
        assistant turn behind the generation prompt, its end-of-turn token included.

        The text is tokenized in pieces, cut where training begins and ends, because generation sees the
        prompt as a piece of its own: the ids before the last answer are those of prompt_ids(messages[:-1])
        wherever the template renders the history alike. Raises DataError when the last turn is not the
        assistant's, or when the template alters a content so that its place cannot be known.
        """
        if not messages or messages[-1].role != "assistant":
            raise DataError("an SFT conversation must end with an assistant turn")
        text = self.render(messages, generation_prompt=False)
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for start, end in (*self._trained_spans(messages, text), (len(text), len(text))):
            for piece, trained in ((text[at:start], False), (text[start:end], True)):
                tokens = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
                ids += tokens
                mask += [trained] * len(tokens)
            at = end
        return np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds to make the assistant speak, e.g. "<|im_start|>assistant\\n"."""
        turn = (Message(role="user", content=SENTINEL.format(0)),)
        closed = self.render(turn, generation_prompt=False)
        return self.render(turn, generation_prompt=True).removeprefix(closed)

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.system_prompt is None or (messages and messages[0].role == "system"):
            return messages
        return (Message(role="system", content=self.system_prompt), *messages)

    def _trained_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """[start, end) characters of `text` that the model must produce: a span per trained answer."""
        marks = [SENTINEL.format(i) for i in range(len(messages))]
        skeleton = self.render(
            [
                Message(role=m.role, content=mark if m.role == "assistant" else m.content)
                for m, mark in zip(messages, marks, strict=True)
            ],
            generation_prompt=False,
        )
        spans = []
        at = 0  # in text
        last = 0  # in skeleton
        for mark, message in zip(marks, messages, strict=True):
            if message.role != "assistant":
                continue
            content = message.content
            cut = skeleton.find(mark, last)
            before = skeleton[last:cut]
            after = skeleton[cut + len(mark) :]
            found = next(
                (
                    c
                    for c in (content, content.lstrip("\n"), content.strip())
                    if _fits(text, at, before, c, after)
                ),
                None,
            )
            if cut < 0 or found is None:
                raise DataError(f"the chat template alters an assistant turn: {content[:60]!r}")
            start = at + self._response_start(before)
            at += len(before) + len(found)
            if message.trained:
                after = after.split("redoneSentinel")[0]
                spans.append((start, at + len(end_of_turn(self.tokenizer, after))))
            last = cut + len(mark)
        return spans

    def _response_start(self, before: str) -> int:
        """Where in the text before an assistant's content the generation prompt ends."""
        header = self.generation_prompt
        whole = before.rfind(header)
        if header and whole >= 0:
            return whole + len(header)
        # a turn of the history may lack the tail of the generation prompt, e.g. an empty thinking block
        size = next((k for k in range(len(header), 0, -1) if before.endswith(header[:k])), 0)
        if size == 0:
            raise DataError("the chat template writes an assistant turn without its generation prompt")
        return len(before)


def load_chat(model: ModelSection) -> Chat:
    """The tokenizer of model.path with the template, system prompt and thinking switch of the
    configuration.

    Raises ModelError when there is no tokenizer or template, no stop id is known, or the tokenizer has ids
    that the model has no embedding for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path={model.path}: no usable tokenizer ({error})") from error
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"model.chat_template={model.chat_template}: {error.strerror}") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"model.path={model.path}: no chat template; set model.chat_template to a Jinja file"
        )
    config = _read_json(Path(model.path) / "config.json")
    rows = config.get("vocab_size")
    if isinstance(rows, int) and _largest_id(tokenizer) >= rows:
        raise ModelError(
            f"model.path={model.path}: the tokenizer has ids up to {_largest_id(tokenizer)}, the model "
            f"{rows} embedding rows; use the tokenizer that belongs to the model, or resize the embedding"
        )
    chat = Chat(tokenizer, (), model.system_prompt, model.enable_thinking)
    generation = _read_json(Path(model.path) / "generation_config.json")
    stops = {*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id")), *_template_stop(chat)}
    if not stops:
        raise ModelError(
            f"model.path={model.path}: no end token is known; add eos_token_id to generation_config.json"
        )
    return Chat(tokenizer, tuple(sorted(stops)), model.system_prompt, model.enable_thinking)


def end_of_turn(tokenizer: PreTrainedTokenizerFast, tail: str) -> str:
    """The leading part of the text behind an assistant's content that ends with its first special token;
    empty when there is none."""
    added = tokenizer.added_tokens_decoder
    found = [
        (tail.find(token.content), len(token.content))
        for token in added.values()
        if token.special and token.content and token.content in tail
    ]
    if not found:
        return ""
    start, size = min(found)
    return tail[: start + size]


def _template_stop(chat: Chat) -> tuple[int, ...]:
    """The template's end-of-turn id: the first special token behind an assistant's content."""
    mark = SENTINEL.format(0)
    turns = (Message(role="user", content="a"), Message(role="assistant", content=mark))
    closing = end_of_turn(chat.tokenizer, chat.render(turns, generation_prompt=False).split(mark)[-1])
    if not closing:
        return ()
    return tuple(chat.tokenizer(closing, add_special_tokens=False)["input_ids"][-1:])


def _fits(text: str, at: int, before: str, content: str, after: str) -> bool:
    """Does `text` go on with before + content + the start of after (up to the next sentinel)?"""
    return text.startswith(before + content + after.split("redoneSentinel")[0], at)


def _largest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return int(max(tokenizer.get_vocab().values()))


def _ids(value: object) -> tuple[int, ...]:
    """eos_token_id may be absent, one id or several."""
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, list) else ()


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return found
