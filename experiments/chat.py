"""Chat with a target and its drafter in the terminal. Config: conf/chat.yaml.

The text appears as blocks are verified. Tokens that the drafter drafted and the target accepted are green, the target's
own are plain. A line after each answer compares the token rate with that of the target alone.
"""

import logging
from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from drafter.data.control_tokens import NEUTRAL
from drafter.data.conversations import Conversation, UnusableConversation
from drafter.data.prompts import check_embedding, encode_conversation
from drafter.decoding.capabilities import check_can_decode
from drafter.decoding.drafting import compiled_with, with_models
from drafter.decoding.options import Adaptive, DecodingOptions, check_draft_length, max_draft_length
from drafter.interruptions import Interrupted
from drafter.models.compatibility import check_pair
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import (
    context_limit,
    load_config,
    load_generation_config,
    load_target,
    load_tokenizer,
    vocabulary_width,
)
from drafter.models.packing import pack
from drafter.warping import Sampling
from experiments.running.chat_screen import ChatScreen
from experiments.running.chat_session import ChatSession, Pair, summary, system_messages
from experiments.running.commands import command
from experiments.running.inputs import target_source
from experiments.running.named_drafters import check_compiles, check_named, load_named, model_of, model_source
from experiments.running.tasks import draft_length

log = logging.getLogger(__name__)
DEFAULT_GAMMA = 4  # of a drafter that was not exported


@command("chat")
def main(cfg: DictConfig) -> None:
    """Answer chat.prompt, or the messages from standard input, one after another."""
    tokenizer = check(cfg)
    if cfg.dry_run:
        return print(f"{cfg.chat.drafter} can draft for {cfg.target.path}")
    session, screen = open_session(cfg, tokenizer), ChatScreen()
    if cfg.chat.prompt is not None:
        return take_turn(session, screen, str(cfg.chat.prompt), cfg.chat.compare)
    if screen.is_typed:
        screen.note(
            f"{cfg.target.path} answers, {cfg.chat.drafter} drafts{drafted(session.pair.num_speculative_tokens)}"
            + (", in green what was drafted and accepted" if screen.has_colours else "")
            + ". /new starts again, /quit or Ctrl-D ends, Ctrl-C stops an answer.\n"
        )
    converse(session, screen, screen.messages(), cfg.chat.compare)


def drafted(gamma: int | Adaptive) -> str:
    """Return how many tokens are drafted per block, for the first line."""
    return "" if isinstance(gamma, Adaptive) else f" {gamma} token{'s' if gamma > 1 else ''} per block"


def converse(session: ChatSession, screen: ChatScreen, messages: Iterable[str], with_comparison: bool) -> None:
    """Answer the messages. What cannot be answered, or is stopped, leaves the conversation ready for the next one."""
    for message in messages:
        if message == "/new":
            session.start_again()
            screen.note("A new conversation.\n")
            continue
        try:
            take_turn(session, screen, message, with_comparison)
        except UnusableConversation as problem:
            screen.note(f"Not answered: {problem}")
        except Interrupted as interruption:
            screen.require_typed(interruption)
            screen.note("\nStopped.")
        print()


def take_turn(session: ChatSession, screen: ChatScreen, message: str, with_comparison: bool) -> None:
    """Answer a message, then let the target answer it alone, and print the line about both.

    The target alone always comes second, because its run is silent, and nobody should wait for a silent run first.
    """
    prompt, alone = session.prompt(message), None
    if prompt.dropped:
        screen.note(f"The context is full: the oldest turns are forgotten ({prompt.dropped}).")
    answer = session.answer(prompt, screen.show)
    print()
    if with_comparison:
        try:
            with screen.passing("The target alone …"):
                alone = session.answer_alone(prompt)
        except Interrupted as interruption:
            screen.require_typed(interruption)
    screen.note(summary(answer, alone, session.pair.options))


def check(cfg: DictConfig) -> PreTrainedTokenizerBase:
    """Refuse settings and models that cannot chat, before any weights are loaded, and return the target's tokenizer.

    Raises:
        ValueError: names the setting or the model, and what to do.
    """
    target, chat = target_source(cfg), cfg.chat
    check_draft_length(chosen_draft_length(cfg))
    options_of(cfg, [])
    if chat.prompt is not None and not str(chat.prompt).strip():
        raise ValueError("chat.prompt is empty: give a message, or null to read messages from the terminal")
    check_can_decode(load_config(target))
    check_drafter(cfg)
    tokenizer = load_tokenizer(target)
    if tokenizer.chat_template is None:
        raise ValueError(f"target.path is {cfg.target.path}, which has no chat template: give the path of a chat model")
    check_opening(cfg, tokenizer)
    check_embedding(tokenizer, vocabulary_width(target), cfg.target.path)
    if model := model_of(chat.drafter):
        check_pair(target, model_source(cfg, model), cfg.pad_vocabulary)
    return tokenizer


def check_drafter(cfg: DictConfig) -> None:
    """Refuse a drafter that does not exist, and say where one comes from."""
    remedy = "`make demo` makes one for the demo's target; otherwise give the directory of a finetuning or an export"
    if cfg.chat.drafter is None:
        raise ValueError(f"chat.drafter is null: {remedy}")
    check_named(cfg, cfg.chat.drafter)
    check_compiles(cfg, "chat")
    model = model_of(cfg.chat.drafter)
    if model is None:
        return
    try:
        check_can_decode(load_config(model_source(cfg, model)))
    except OSError as problem:
        raise ValueError(f"chat.drafter is {cfg.chat.drafter}, which is no model: {remedy}") from problem


def chosen_draft_length(cfg: DictConfig) -> int | Adaptive:
    """Return γ: that of the config, that of an exported drafter's generation config, or else DEFAULT_GAMMA."""
    gamma, drafter = cfg.chat.num_speculative_tokens, cfg.chat.drafter
    model = None if drafter is None else model_of(drafter)
    if gamma is None and model is not None:
        own = load_generation_config(model_source(cfg, model))
        gamma = own.num_assistant_tokens if own else None
    return draft_length(DEFAULT_GAMMA if gamma is None else gamma, cfg.chat.adaptive, "chat.num_speculative_tokens")


def check_opening(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a system message that the chat template refuses, and a context without room for a short message."""
    chat, context = cfg.chat, context_of(cfg)
    messages = [*system_messages(chat.system), {"role": "user", "content": NEUTRAL}]
    try:
        length = len(encode_conversation(tokenizer, Conversation(messages)))
    except UnusableConversation as problem:
        raise ValueError(f"chat.system: {problem}") from None
    if length + chat.max_new_tokens > context:
        raise ValueError(
            f"chat.max_new_tokens is {chat.max_new_tokens}, and the template with chat.system and a short message has "
            f"{length} tokens, which exceeds the context of {context} tokens: shorten one of the two"
        )


def context_of(cfg: DictConfig) -> int:
    """Return the most tokens of a conversation: chat.context, or the shorter context of the two models.

    Raises:
        ValueError: chat.context exceeds it.
    """
    target, model = target_source(cfg), model_of(cfg.chat.drafter)
    limit = context_limit(target)
    if model is not None:
        limit = min(limit, context_limit(model_source(cfg, model)))
    context = cfg.chat.context or limit
    if context > limit:
        raise ValueError(f"chat.context is {context}, and the shorter context of the two models is {limit}")
    return int(context)


def options_of(cfg: DictConfig, stop_ids: list[int]) -> DecodingOptions:
    """Return how answers are decoded."""
    try:
        return DecodingOptions(cfg.chat.max_new_tokens, Sampling(cfg.chat.temperature, cfg.chat.top_p), stop_ids)
    except ValueError as problem:
        raise ValueError(f"chat.{problem}") from None


def open_session(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase) -> ChatSession:
    """Load the models, make their first calls, and return a conversation without a turn."""
    chat, context = cfg.chat, context_of(cfg)
    target = load_target(target_source(cfg)).to("cuda" if torch.cuda.is_available() else "cpu")
    drafter = with_models(load_named(cfg, chat.drafter, target), lambda model: model.to(target.device))
    gamma = chosen_draft_length(cfg)
    if chat.compile:
        log.info("the first calls compile both models, which takes minutes")
        target, drafter = compiled_with(target, drafter, context, [max_draft_length(gamma)])
    else:
        target, drafter = pack(target), with_models(drafter, pack)
    pair = Pair(target, drafter, gamma, options_of(cfg, end_of_turn_ids(target_source(cfg), tokenizer)))
    session = ChatSession(pair, tokenizer, context, chat.system, cfg.seed)
    pair.warm_up(session.prompt(NEUTRAL).ids)
    return session


if __name__ == "__main__":
    main()
