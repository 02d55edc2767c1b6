"""Tell thinking, tool calls and the answer apart in what a target has generated, by the markers that it writes.

A span begins with its opening marker and ends with its closing marker, and both belong to it; what is inside, other
markers too, belongs to the span. Everything outside of spans is the answer. White space and the stop token after a
span belong to it as well, so that a reply that is a tool call and nothing else has no answer. A tool call without a
marker, as Llama 3.1 writes its JSON, is a part of the answer.

If a marker is one token of the tokenizer's vocabulary, only this token is the marker; a text that spells it out is not.
Any other marker is text, and opens a span only at the beginning of a line.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

THINKING, ANSWER, TOOL_CALL = "thinking", "answer", "tool call"
ROLES = (THINKING, ANSWER, TOOL_CALL)


class Span(NamedTuple):
    """The markers of a role as regular expressions; without a closing one, the span goes on to the end."""

    role: str
    opening: str
    closing: str | None


# The header of a message of gpt-oss; the first one of a reply has no `<|start|>`, which the prompt has already.
HEADER = r"(?:<\|start\|>assistant[^<]*)?<\|channel\|>{}[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
END = r"<\|(?:end|return|call)\|>"
SPANS = (
    Span(THINKING, "<think>", "</think>"),  # DeepSeek R1, Qwen3
    Span(THINKING, r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    Span(TOOL_CALL, "<tool_call>", "</tool_call>"),  # Qwen, Hermes
    Span(TOOL_CALL, r"<\|tool_call\|>", r"<\|/tool_call\|>"),  # Phi-4-mini
    Span(TOOL_CALL, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek
    Span(TOOL_CALL, r"\[TOOL_CALLS\]", None),  # Mistral
    Span(TOOL_CALL, r"<\|python_tag\|>", None),  # Llama 3.1
    Span(THINKING, HEADER.format("analysis"), END),  # gpt-oss
    Span(TOOL_CALL, HEADER.format("commentary[^<]* to="), END),
    Span(TOOL_CALL, r"<\|start\|>assistant to=[^<]*<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>", END),
)
OPENINGS = re.compile("|".join(f"({span.opening})" for span in SPANS))


@dataclass(frozen=True)
class RoleReader:
    """Assigns roles to the tokens that a target has generated.

    Attributes:
        tokenizer: the target's.
        stop_ids: the tokens that end an answer.
    """

    tokenizer: Any
    stop_ids: Collection[int] = ()

    def roles(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
        """Return the role of each token: one of ROLES.

        Args:
            prompt: the tokens before, whose generation prompt may have opened the thinking already.
            tokens: the generated tokens.
        """
        pieces = [self.tokenizer.decode([token]) for token in tokens]
        text, owners = "".join(pieces), [number for number, piece in enumerate(pieces) for _ in piece]
        roles, position = [ANSWER] * len(tokens), 0
        span, start = self._opened_by(prompt), 0
        while True:
            if span is None:
                found = self._search(OPENINGS, text, position, tokens, owners, True)
                if found is None:
                    return roles
                span, start, position = SPANS[(found.lastindex or 1) - 1], owners[found.start()], found.end()
            closing = span.closing and self._search(re.compile(span.closing), text, position, tokens, owners, False)
            end = owners[closing.end() - 1] + 1 if closing else len(tokens)
            while end < len(tokens) and (not pieces[end].strip() or tokens[end] in self.stop_ids):
                end += 1
            roles[start:end] = [span.role] * (end - start)
            if not closing:
                return roles
            span, position = None, closing.end()

    def _opened_by(self, prompt: Sequence[int]) -> Span | None:
        """Return the span of thinking that a prompt ends with the opening of."""
        text = self.tokenizer.decode(list(prompt[-16:])).rstrip()
        spans = [SPANS[(found.lastindex or 1) - 1] for found in OPENINGS.finditer(text) if found.end() == len(text)]
        return next((span for span in spans if span.role == THINKING), None)

    def _search(
        self, pattern: re.Pattern[str], text: str, start: int, tokens: Sequence[int], owners: list[int], opens: bool
    ) -> re.Match[str] | None:
        """Return the next marker from a position in the text on; see the head of this module."""
        for found in pattern.finditer(text, start):
            first = re.match(r"<[^>]*>|\[[^\]]*\]", found[0])  # the marker, or the first control token of a header
            known = self._id(first[0]) if first else None
            begins_line = not text[: found.start()].rpartition("\n")[2].strip()
            if tokens[owners[found.start()]] == known or (known is None and (begins_line or not opens)):
                return found
        return None

    def _id(self, text: str) -> int | None:
        """Return the id of the token that has this text, or None if the vocabulary has no such token."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        return None if token is None or token == self.tokenizer.unk_token_id else int(token)
