"""Traces of JSON lines: what a line of each format says.

A format is a function that makes a *parser* for one pass over a file (some remember what came before). A parser
takes a line's object and gives its request, or None for a line that stands for none. It raises KeyError, TypeError
or ValueError for a bad one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any, cast

from hicache.sim.traces.ids import chained, narrowed, token_blocks
from hicache.sim.traces.model import Request

Line = Mapping[str, Any]
Parser = Callable[[Line], Request | None]


def whole(value: object, name: str) -> int:
    """A count or a time of a line. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number")
    if not -1e15 < value < 1e15:  # also what is not a number at all
        raise ValueError(f"{name} is out of range")
    return round(value)


def text(value: object) -> str:
    """A name of a line: whatever it is written as."""
    return value if isinstance(value, str) else str(value)


def _turn(line: Line) -> int:
    turn = whole(line.get("turn", 0), "turn")
    if not 0 <= turn < 1 << 31:
        raise ValueError("turn is out of range")
    return turn


def _list(line: Line, name: str) -> list[object]:
    found = line[name]
    if not isinstance(found, list):
        raise TypeError(f"{name} must be a list")
    return found


def mooncake(block_tokens: int) -> Parser:
    """Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (chained, 512 tokens).

    Also ``type``, ``turn`` and ``chat_id``, which our own converter adds.
    """

    def parse(line: Line) -> Request:
        blocks = narrowed(_list(line, "hash_ids"))
        at_ms = whole(line.get("timestamp", 0), "timestamp")
        asked = whole(line.get("input_length", len(blocks) * block_tokens), "input_length")
        answered = whole(line.get("output_length", 0), "output_length")
        if "type" not in line and "turn" not in line and "chat_id" not in line:
            return Request(at_ms, asked, answered, blocks)
        return Request(
            at_ms,
            asked,
            answered,
            blocks,
            cls=text(line.get("type", "")),
            turn=_turn(line),
            session=text(line.get("chat_id", "")),
        )

    return parse


#: Conversations of which a Bailian reader remembers the first request; the oldest are forgotten.
CHATS_REMEMBERED = 1 << 20


def bailian(block_tokens: int) -> Parser:
    """Qwen-Bailian: times in seconds; ``hash_ids`` name blocks of 16 tokens by themselves, so they are chained here.

    ``chat_id`` and ``parent_chat_id`` (-1: none) tell which requests are one conversation.
    """
    roots: dict[str, str] = {}

    def parse(line: Line) -> Request:
        blocks = chained(narrowed(_list(line, "hash_ids")))
        at_ms = whole(seconds(line["timestamp"]) * 1000, "timestamp")
        chat, parent = text(line["chat_id"]), text(line["parent_chat_id"])
        root = roots.get(parent, parent if parent != "-1" else chat)
        roots[chat] = root
        if len(roots) > CHATS_REMEMBERED:
            del roots[next(iter(roots))]
        return Request(
            at_ms,
            whole(line.get("input_length", len(blocks) * block_tokens), "input_length"),
            whole(line.get("output_length", 0), "output_length"),
            blocks,
            cls=text(line.get("type", "")),
            turn=_turn(line),
            session=root,
        )

    return parse


def seconds(value: object) -> float:
    """A time of a line. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("timestamp must be a number")
    return float(value)


def lookups(block_tokens: int) -> Parser:
    """LMCache's look-up log: ``timestamp`` (s), ``chunk_size``, ``seq_len``, ``chunk_hashes`` (chained, hexadecimal).

    Times are told from the first line on. Each look-up is a request; its model's name becomes its class.
    """
    began: list[float] = []

    def parse(line: Line) -> Request:
        chunk = whole(line.get("chunk_size", block_tokens), "chunk_size")
        if chunk != block_tokens:
            raise ValueError(f"chunk_size {chunk} in a trace of {block_tokens}-token blocks")
        blocks = narrowed(_list(line, "chunk_hashes"))
        at_s = seconds(line.get("timestamp", 0))
        asked = whole(line.get("seq_len", len(blocks) * chunk), "seq_len")
        if not began:
            began.append(at_s)
        at_ms = whole((at_s - began[0]) * 1000, "timestamp")
        return Request(at_ms, asked, 0, blocks, cls=text(line.get("model_name", "")))

    return parse


TOKEN_KEYS = ("token_ids", "prompt_token_ids", "input_ids", "tokens")
TEXT_KEYS = ("prompt", "text", "messages")


def tokens(block_tokens: int) -> Parser:
    """Token ids of each prompt, below one of ``TOKEN_KEYS``; whole blocks of them are hashed, chained."""

    def parse(line: Line) -> Request:
        name = next((key for key in TOKEN_KEYS if key in line), TOKEN_KEYS[0])
        try:
            ids = array("i", cast("list[int]", _list(line, name)))  # what is no number raises
        except OverflowError as error:
            raise ValueError(f"{name}: a token id does not fit 32 bits") from error
        return described(line, token_blocks(ids, block_tokens), len(ids))

    return parse


def described(line: Line, blocks: array[int], input_tokens: int) -> Request:
    """A request whose prompt stands in the line itself, with whatever else the line tells."""
    answer = line.get("output_token_ids")
    answered = len(answer) if isinstance(answer, list) else line.get("output_length", 0)
    return Request(
        whole(line.get("timestamp", 0), "timestamp"),
        input_tokens,
        whole(answered, "output_length"),
        blocks,
        cls=text(line.get("type", "")),
        turn=_turn(line),
        session=text(line.get("session", line.get("chat_id", ""))),
    )


def texts(encode: Callable[[str], list[int]]) -> Callable[[int], Parser]:
    """Prompts as text (``prompt``, ``text`` or ``messages``), made tokens by ``encode``, then hashed in blocks."""

    def make(block_tokens: int) -> Parser:
        def parse(line: Line) -> Request:
            ids = array("i", encode(_prompt(line)))
            return described(line, token_blocks(ids, block_tokens), len(ids))

        return parse

    return make


def _prompt(line: Line) -> str:
    for name in ("prompt", "text"):
        if isinstance(line.get(name), str):
            return str(line[name])
    parts = []
    for message in _list(line, "messages"):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise TypeError("messages must have a role and content, both text")
        parts.append(f"{message.get('role', '')}: {message['content']}\n")
    return "".join(parts)
