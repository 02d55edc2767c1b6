"""A conversation with a target and its drafter: the prompt of each turn, the answer, and the target's answer alone."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from drafter.data.conversations import Conversation, Message, UnusableConversation
from drafter.data.prompts import encode_conversation
from drafter.data.text_stream import Piece, TextStream
from drafter.decoding.acceptance import Block
from drafter.decoding.capabilities import decoder_of
from drafter.decoding.decoders import Decodable
from drafter.decoding.drafting import Drafter, models_of
from drafter.decoding.generation import Decoded, first_difference
from drafter.decoding.options import Adaptive, DecodingOptions, max_draft_length
from drafter.decoding.speculative import autoregressive_decode, speculative_decode

TOO_LONG = (
    "the message has {length} tokens in the chat template; with max_new_tokens={new} it exceeds the context of "
    "{context} tokens: shorten it, or lower max_new_tokens"
)


class Pair(NamedTuple):
    """A target and its drafter, and how they decode together."""

    target: Decodable
    drafter: Drafter
    num_speculative_tokens: int | Adaptive
    options: DecodingOptions

    def generator(self, seed: int) -> torch.Generator:
        """Return a source of random numbers on the pair's device."""
        return torch.Generator(self.target.device).manual_seed(seed)

    @torch.inference_mode()
    def warm_up(self, prompt: list[int]) -> None:
        """Make every kind of call once, because the first ones are slow: they set up, or compile."""
        most = max_draft_length(self.num_speculative_tokens)
        for model, longest in ((self.target, most + 1), *((model, 2) for model in models_of(self.drafter))):
            decoder = decoder_of(model)
            decoder.forward([prompt], [0], 1)
            for count in range(1, longest + 1):
                decoder.forward([(prompt * longest)[:count]], [len(prompt)], count)
        options = DecodingOptions(most + 1, self.options.sampling)
        speculative_decode(
            self.target, self.drafter, prompt, self.num_speculative_tokens, options, self.generator(seed=0)
        )


class Prompt(NamedTuple):
    """The prompt of a turn.

    Attributes:
        message: the user's message.
        ids: the conversation's token ids up to the answer.
        dropped: how many of the oldest turns were dropped because the context is too short for them.
    """

    message: str
    ids: list[int]
    dropped: int


class Answer(NamedTuple):
    """What was decoded, and the seconds that it took without those of showing it."""

    decoded: Decoded
    seconds: float


def system_messages(system: str | None) -> list[Message]:
    """Return the messages at the beginning of a conversation: the system message, if there is one."""
    return [{"role": "system", "content": str(system)}] if system else []


class ChatSession:
    """A conversation that goes on from turn to turn.

    Args:
        pair: the models.
        tokenizer: the target's.
        context: the most tokens of a conversation with its answer.
        system: a system message, or None.
        seed: of the random numbers.
    """

    def __init__(self, pair: Pair, tokenizer: PreTrainedTokenizerBase, context: int, system: str | None, seed: int):
        self.pair, self.tokenizer, self.context, self.seed = pair, tokenizer, context, seed
        self.system = system_messages(system)
        self.turns: list[list[Message]] = []
        self.generator = pair.generator(seed)

    def start_again(self) -> None:
        """Forget the turns so far."""
        self.turns.clear()

    def prompt(self, message: str) -> Prompt:
        """Return the prompt of the next turn, and drop the oldest turns that do not fit into the context.

        Raises:
            UnusableConversation: the message alone exceeds the context, or the chat template refuses it.
        """
        asked, new, dropped = {"role": "user", "content": message}, self.pair.options.max_new_tokens, 0
        while True:
            kept = [one for turn in self.turns[dropped:] for one in turn]
            ids = encode_conversation(self.tokenizer, Conversation([*self.system, *kept, asked]))
            if len(ids) + new <= self.context:
                del self.turns[:dropped]
                return Prompt(message, ids, dropped)
            if dropped == len(self.turns):
                raise UnusableConversation(TOO_LONG.format(length=len(ids), new=new, context=self.context))
            dropped += 1

    def answer(self, prompt: Prompt, show: Callable[[Piece], None]) -> Answer:
        """Decode the answer with the drafter, show it block by block, and add the turn to the conversation.

        If it is interrupted, the turn is added with the text that was shown, if any.
        """
        stream, shown, showing, decoded = TextStream(self.tokenizer), "", 0.0, None

        def show_pieces(pieces: list[Piece]) -> None:
            nonlocal shown
            for piece in pieces:
                show(piece)
                shown += piece.text

        def show_block(block: Block) -> None:
            nonlocal showing
            began = time.perf_counter()
            for number, token in enumerate(block.emitted):
                if token not in self.pair.options.stop_ids:
                    show_pieces(stream.feed(token, drafted=number < block.accepted))
            showing += time.perf_counter() - began

        target, drafter, gamma, options = self.pair
        try:
            decoded = speculative_decode(target, drafter, prompt.ids, gamma, options, self.generator, show_block)
            show_pieces(stream.finish())
        finally:
            if shown or decoded:
                # A template that begins answers with a space adds it again.
                answered = {"role": "assistant", "content": shown.strip()}
                self.turns.append([{"role": "user", "content": prompt.message}, answered])
        return Answer(decoded, decoded.seconds.total - showing)

    def answer_alone(self, prompt: Prompt) -> Answer:
        """Decode the answer with the target alone; the conversation and its random numbers stay as they are."""
        target, _, _, options = self.pair
        decoded = autoregressive_decode(target, prompt.ids, options, self.pair.generator(self.seed))
        return Answer(decoded, decoded.seconds.total)


def summary(answer: Answer, alone: Answer | None, options: DecodingOptions) -> str:
    """Return one line about an answer: tokens, time, token rate, τ and the share of drafted tokens.

    Args:
        answer: the answer with the drafter.
        alone: the target's answer alone, to compare with; None for no comparison.
        options: how both were decoded.
    """
    tokens, blocks = answer.decoded.tokens, answer.decoded.blocks
    accepted, rate = sum(block.accepted for block in blocks), len(tokens) / answer.seconds
    cut = "" if tokens[-1] in options.stop_ids else ", cut off,"
    line = f"{len(tokens)} tokens{cut} in {answer.seconds:.1f} s: "
    details = f"(τ {len(tokens) / len(blocks):.1f}, {accepted / len(tokens):.0%} drafted)"
    if alone is None:
        return f"{line}{rate:.1f} tokens/s {details}"
    alone_rate = len(alone.decoded.tokens) / alone.seconds
    line += f"with the drafter {rate:.1f} tokens/s, without {alone_rate:.1f}: {rate / alone_rate:.2f} times as fast "
    return line + details + (compare(tokens, alone.decoded.tokens) if options.sampling.temperature == 0 else "")


def compare(tokens: list[int], alone: list[int]) -> str:
    """Say whether greedy decoding gave the same tokens with the drafter as without it."""
    position = first_difference(tokens, alone)
    if position is None:
        return "; the target alone writes the same"
    return f"; the target alone differs at token {position + 1}"
