"""Decode the turns of a conversation one after another, each after the target's own answers to those before it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from drafter.data.dialogues import Continuation, Prompt
from drafter.decoding.evaluation import Decodings, Task, as_text
from drafter.decoding.roles import RoleReader
from drafter.metrics import by_label, conversation_and_turn, turn_id

Result = TypeVar("Result")


class Work(NamedTuple):
    """The prompts of all tasks; of a conversation, only the first turn, because the others follow from its answers.

    Attributes:
        tasks: the first turns, in the order of the tasks.
        continuations: how the turns of each task of conversations go on.
        left_out: for these tasks, how many turns cannot be begun, by reason.
    """

    tasks: list[Task]
    continuations: Mapping[str, Continuation]
    left_out: Mapping[str, Counter[str]]

    def turns_asked(self, task: str) -> int:
        """Return the number of turns of a task of conversations, with those that cannot be begun."""
        begun = sum(len(one.dialogue.points) for one in self.tasks if one.name == task)
        return begun + self.left_out[task].total()


class Reached(NamedTuple, Generic[Result]):
    """The turns of a conversation that were reached, what each gave, and how many others were left out, by reason."""

    turns: list[tuple[Task, Result]]
    left_out: Counter[str]


def decode_turns(
    work: Work, first: Task, decode_turn: Callable[[Task], Result], answer: Callable[[Result], list[int]]
) -> Reached[Result]:
    """Decode a conversation's turns in order (see `decode_turns_together`)."""
    return decode_turns_together(work, [first], lambda tasks: [decode_turn(task) for task in tasks], answer)[0]


def decode_turns_together(
    work: Work,
    firsts: Sequence[Task],
    decode_turns_of: Callable[[list[Task]], list[Result]],
    answer: Callable[[Result], list[int]],
) -> list[Reached[Result]]:
    """Decode the first turns of conversations, then their second turns, and so on; a single prompt has one turn.

    Args:
        work: what the tasks are from.
        firsts: the first turns.
        decode_turns_of: decodes one turn of each conversation that goes on.
        answer: takes the tokens of the target's own answer from a result. The next turn follows them whatever a drafter
            gave, so that all drafters decode the same prompts.
    """
    found: list[Reached[Result]] = [Reached([], Counter()) for _ in firsts]
    active = list(zip(firsts, found, strict=True))
    while active:
        going_on = []
        results = decode_turns_of([task for task, _ in active])
        for (task, reached), result in zip(active, results, strict=True):
            reached.turns.append((task, result))
            step = following(work, task, answer(result))
            if isinstance(step, Task):
                going_on.append((step, reached))
            elif step:
                reached.left_out[step] += len(task.dialogue.points) - 1
        active = going_on
    return found


def following(work: Work, task: Task, tokens: list[int]) -> Task | str | None:
    """Return the next turn of a conversation; None after the last; or the reason why the later ones are left out."""
    if task.dialogue is None:
        return None
    step = work.continuations[task.name].after(task.dialogue, tokens)
    if not isinstance(step, Prompt):
        return step
    conversation, _ = conversation_and_turn(task.prompt_id)
    return task._replace(
        prompt_id=turn_id(conversation, task.turn + 1),
        message=step.dialogue.before().asked()[-1],
        prompt=step.prompt_ids,
        turn=task.turn + 1,
        dialogue=step.dialogue,
    )


def target_answer(found: Decodings) -> list[int]:
    """Return the tokens of the target's own answer."""
    return found.baseline.tokens


def check_fits(work: Work, contexts: Mapping[str, int]) -> None:
    """Check that each drafter can begin a conversation of each task of conversations.

    Raises:
        ValueError: no prompt and answer of a task fit into a drafter's context; names the shortest.
    """
    for name in work.continuations:
        of_task = [task for task in work.tasks if task.name == name]
        shortest = min(len(task.prompt) + task.options.max_new_tokens for task in of_task)
        for path, context in contexts.items():
            if shortest > context:
                raise ValueError(
                    f"no conversation of task.{name} fits into the context of {context} tokens of {path}: the shortest "
                    f"prompt needs {shortest} with its answer; lower task.{name}.max_new_tokens, or leave the task out"
                )


def part_rows(
    reached: Reached[Decodings], path: str, reader: RoleReader, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return the rows of a part's file for one drafter: each turn at each γ, and the turns that were left out."""
    rows, left_out = [], reached.left_out.copy()
    for task, found in reached.turns:
        left_out["too long for the drafter's context"] += not found.by_drafter.get(path)
        for row, decoded in found.by_drafter.get(path, []):
            by_role = by_label(decoded.blocks, reader.roles(task.prompt, decoded.tokens))
            rows.append({**row, "by_role": by_role, "blocks": as_text(decoded, tokenizer)})
    name = reached.turns[0][0].name
    return [*rows, {"task": name, "turns_left_out": +left_out}] if +left_out else rows


def turns_by_task(work: Work, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each task of conversations how many turns were asked, decoded and, by reason, left out."""
    found = {}
    for name in work.continuations:
        of_task = [row for row in rows if row["task"] == name]
        left_out = sum((Counter(row.get("turns_left_out", {})) for row in of_task), work.left_out[name])
        decoded = len({row["prompt"] for row in of_task if "prompt" in row})
        found[name] = {"asked": work.turns_asked(name), "decoded": decoded, "left_out": left_out}
    return found
