"""Conversations are evaluated turn by turn: each turn follows the target's own answers, and every turn is counted."""

import pytest
from omegaconf import OmegaConf

from drafter.artifacts.manifest import read_jsonl, read_manifest
from drafter.decoding.evaluation import decode
from drafter.metrics import TIMES, Counts
from experiments.reporting.results import read_evaluations, rows_by_rule
from experiments.running.tasks import check_tasks, decoding_settings, read_tasks
from experiments.running.turns import check_fits, decode_turns, part_rows, target_answer
from tests.chat_target import chat_model, chat_tokenizer, save_chat_target
from tests.conftest import write_jsonl
from tests.experiments.test_pipeline import stage

ASKED = ["who saw the cat ?", "what did the dog likes ?", "why ?"]
PLAIN = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "in_domain": True}
CHATS = {**PLAIN, "kind": "conversations"}
CONTEXT = 128
TAU = ("tokens", "target_calls")


def unlogged(texts):
    """The messages that `prepare` makes of MT-Bench's form."""
    silent = {"role": "assistant", "content": "", "logged": False}
    return [message for text in texts for message in ({"role": "user", "content": text}, silent)][:-1]


def work(folder, rows, context=CONTEXT, turns="all", stops=("<end>", "<|stop|>"), **settings):
    tokenizer = chat_tokenizer()
    write_jsonl(folder / "tasks.jsonl", [{"id": f"chats:{n}", "task": "chats", **row} for n, row in enumerate(rows)])
    cfg = OmegaConf.create({"inputs": {"data": str(folder)}, "task": {"chats": {**CHATS, "turns": turns, **settings}}})
    return read_tasks(cfg, tokenizer, context, 100, tokenizer.convert_tokens_to_ids(list(stops)), {})


def said(*words):
    return lambda _: chat_tokenizer().convert_tokens_to_ids([*words, "<|stop|>"])


def reach(found, answer, number=0):
    """The turns that are reached with a given answer, of which nothing is decoded."""
    return decode_turns(found, found.tasks[number], lambda task: None, answer)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_turn_is_the_templates_rendering_of_the_targets_own_answers(tmp_path, temperature):
    tokenizer, system = chat_tokenizer(), {"role": "system", "content": "then run"}
    target, drafters = chat_model(), {"a": chat_model(1)}
    rows = [{"messages": [system, *unlogged([f"{text} {word}" for text in ASKED])]} for word in ("cat", "dog")]
    found = work(tmp_path, rows, temperature=temperature)
    later = 0
    for number in range(len(rows)):
        reached = decode_turns(
            found, found.tasks[number], lambda task: decode(task, target, drafters, {3: 3}, 0), target_answer
        )
        messages = [system]
        for turn, (task, of_turn) in enumerate(reached.turns, start=1):
            messages.append(rows[number]["messages"][2 * turn - 1])
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert task.prompt == ids
            assert task.message == messages[-1]["content"]
            assert (task.turn, task.prompt_id) == (turn, f"chats:{number}" + f"#{turn}" * (turn > 1))
            *answer, _ = of_turn.baseline.tokens
            messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
            for (one,) in of_turn.by_drafter.values():  # what a drafter's decoding gave does not enter the next turn
                assert one.row["like_the_target"] or temperature
            later += turn > 1
        assert len(reached.turns) + sum(reached.left_out.values()) == len(ASKED)
    assert later


def test_a_logged_call_and_its_result_stay(tmp_path):
    tokenizer = chat_tokenizer()
    call = {"role": "assistant", "content": "then", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "river"}
    user = {"role": "user", "content": ASKED[0]}
    found = work(tmp_path, [{"messages": [user, call, result, {"role": "assistant", "content": "door"}]}])
    first, second = (task for task, _ in reach(found, said("dog")).turns)
    given = [user, {"role": "assistant", "content": "then"}, result]
    ids = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    assert (second.prompt, second.message) == (ids, first.message)


@pytest.mark.parametrize(
    ("words", "context", "reason", "turns"),
    [
        (["<|stop|>", "dog"], CONTEXT, "after an answer that was cut off", 1),
        (["<|user|>", "<|stop|>"], CONTEXT, "after an answer that contains control tokens", 1),
        (["dog", "<|stop|>"], 34, "too long for the context", 2),
    ],
)
def test_turns_that_cannot_be_reached_are_counted(tmp_path, words, context, reason, turns):
    found = work(tmp_path, [{"messages": unlogged(ASKED)}], context=context)
    reached = reach(found, lambda _: chat_tokenizer().convert_tokens_to_ids(words))
    assert len(reached.turns) == turns
    assert reached.left_out == {reason: len(ASKED) - turns}
    assert found.turns_asked("chats") == 3


def test_turns_that_cannot_be_begun_are_counted_or_refused(tmp_path):
    logged = [
        {"role": "user", "content": "why ?"},
        {"role": "assistant", "content": "then"},
        {"role": "user", "content": "why ?"},
    ]
    long = [{"role": "user", "content": "why " * 200}]
    found = work(tmp_path, [{"messages": m} for m in (unlogged(ASKED), long, logged)], turns="last")
    assert [(task.prompt_id, task.turn) for task in found.tasks] == [("chats:2#2", 2)]
    assert found.left_out["chats"] == {
        "an earlier answer is not logged, so that turns=last has no prompt": 1,
        "too long for the context": 1,
    }
    assert found.turns_asked("chats") == 3
    with pytest.raises(ValueError, match=r"task\.chats has no conversation that can be begun: .*too long"):
        work(tmp_path, [{"messages": long}])


def test_only_the_first_turn_is_decoded_if_asked(tmp_path):
    found = work(tmp_path, [{"messages": unlogged(ASKED)}], turns="first")
    assert [task.prompt_id for task, _ in reach(found, said("dog")).turns] == ["chats:0"]


def test_a_task_that_was_prepared_with_conversations_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"task\.chats was prepared with conversations: give task\.chats\.kind"):
        work(tmp_path, [{"messages": unlogged(ASKED)}], turns=None, kind="files")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**CHATS, "turns": "second"}, "turns is 'second', must be one of all, first, last"),
        ({**PLAIN, "turns": "all"}, r"turns is 'all', which needs task\.chats\.kind=conversations"),
    ],
)
def test_wrong_turns_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(OmegaConf.create({"task": {"chats": settings}}), {})


def test_turns_identify_an_evaluation_of_conversations_alone():
    def identity(settings):
        cfg = OmegaConf.create({"task": {"chats": settings}, "seed": 1, "target": {"dtype": "float32"}})
        return decoding_settings(cfg)["tasks"]["chats"]

    assert identity(PLAIN) == PLAIN
    assert identity(CHATS) == identity({**CHATS, "turns": "all"}) == {**PLAIN, "turns": "all"}


def test_a_turn_that_exceeds_a_drafters_context_is_left_out_for_this_drafter_alone(tmp_path):
    found = work(tmp_path, [{"messages": unlogged(ASKED)}])
    target, drafters = chat_model(), {"a": chat_model(1), "b": chat_model(2)}

    def decode_turn(task):
        fitting = drafters if task.turn == 1 else {"a": drafters["a"]}
        return decode(task, target, fitting, {1: 1, 2: 2}, 0)

    class Reader:
        def roles(self, prompt, tokens):
            return ["answer"] * len(tokens)

    reached = decode_turns(found, found.tasks[0], decode_turn, said("dog"))
    rows = {path: part_rows(reached, path, Reader(), chat_tokenizer()) for path in drafters}
    assert [row["turn"] for row in rows["a"]] == [1, 1, 2, 2, 3, 3]
    assert [row["turn"] for row in rows["b"][:-1]] == [1, 1]
    assert rows["b"][-1] == {"task": "chats", "turns_left_out": {"too long for the drafter's context": 2}}


def test_a_drafter_whose_context_is_too_short_for_every_conversation_is_refused(tmp_path):
    found = work(tmp_path, [{"messages": unlogged(ASKED)}])
    needed = len(found.tasks[0].prompt) + PLAIN["max_new_tokens"]
    check_fits(found, {"long": needed})
    with pytest.raises(
        ValueError, match=f"the context of {needed - 1} tokens of short: the shortest prompt needs {needed}"
    ):
        check_fits(found, {"long": needed, "short": needed - 1})


def command(folder):
    return [
        "scale=smoke", "data=files", "task=files", "logger=csv", f"root={folder}/run", f"target.path={folder}/target",
        f"data.pretraining.path={folder}/text.jsonl", f"data.instructions.questions.path={folder}/asked.jsonl",
        "scale.pretraining_tokens=100", "scale.heldout_tokens=40", "scale.max_prompt_tokens=60",
        "scale.max_new_tokens=12", "scale.prompts_per_task=20", "data.heldout_percent=40",
        f"task.prompts.path={folder}/task.jsonl",
        f"+task.chats={{kind: conversations, path: {folder}/chats.jsonl, temperature: 0.0, top_p: 1.0, "
        "max_new_tokens: 12, in_domain: true}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Prepare and evaluate conversations beside single prompts. Return the root."""
    folder = tmp_path_factory.mktemp("turns")
    save_chat_target(folder / "target")
    save_chat_target(folder / "drafter", seed=1)
    write_jsonl(folder / "text.jsonl", [{"text": f"the cat saw {'a ' * n}dog ."} for n in range(40)])
    write_jsonl(folder / "asked.jsonl", [{"prompt": f"who saw {'the ' * n}cat ?"} for n in range(20)])
    write_jsonl(folder / "task.jsonl", [{"prompt": "who saw the cat ?"}])
    chats = [{"turns": [f"{text} {word}" for text in ASKED], "system": "then run"} for word in ("cat", "dog", "fox")]
    chats += [{"turns": ["why ?"], "tools": [{"name": "f"}]}, {"turns": ["why ?", ""]}, {"messages": []}]
    chats += [{"prompt": "the " * 100}]
    write_jsonl(folder / "chats.jsonl", chats)
    stage("prepare", command(folder))
    stage("evaluate", [*command(folder), f"drafters=[{folder}/drafter]", "evaluate.num_speculative_tokens=[3]"])
    return folder / "run"


def test_every_row_of_a_task_of_conversations_is_used_or_left_out_for_a_reason(evaluated):
    tally = read_manifest(evaluated / "data", "prepare")["counts"]["rows"]["task chats"]
    assert tally["read"] == 7
    assert tally["used"] == {"chats": 3}
    assert tally["left_out"] == {
        "the chat template has no place for tools": 1,
        "an empty message of the user": 1,
        "messages is no list of messages": 1,
        "too long": 1,
    }


def test_the_counts_of_turns_roles_and_positions_add_up(evaluated):
    folder = evaluated / "evaluate" / "drafter"
    rows = read_jsonl(folder / "counts.jsonl")
    for row in rows:
        for name in ("by_role", "by_answer_position"):
            assert [sum(part) for part in zip(*row[name].values(), strict=True)] == [row["tokens"], row["target_calls"]]
        assert set(Counts._fields) <= row.keys()
    assert {row["turn"] for row in rows if row["task"] == "prompts"} == {1}
    of_chats = [row for row in rows if row["task"] == "chats"]
    manifest = read_manifest(folder, "evaluate")
    turns = manifest["counts"]["turns"]["chats"]
    assert turns["asked"] == 3 * len(ASKED) == turns["decoded"] + sum(turns["left_out"].values())
    assert turns["decoded"] == len(of_chats) > 3
    assert manifest["counts"]["greedy_outputs_unlike_the_target"] == 0
    assert all("message" in row and "blocks" in row for row in read_jsonl(folder / "samples.jsonl"))


def test_turns_and_prompts_side_by_side_have_the_same_counts_without_times(evaluated, tmp_path):
    folder = evaluated.parent
    how = ["evaluate.batch_size=4", "evaluate.num_speculative_tokens=[3]", f"out={tmp_path}"]
    stage("evaluate", [*command(folder), *how, f"drafters=[{folder}/drafter]"])
    alone, together = (read_manifest(path / "drafter", "evaluate") for path in (evaluated / "evaluate", tmp_path))
    assert together["settings"] == alone["settings"] | {"batch_size": 4}  # earlier evaluations, without it, stay valid
    assert together["counts"] == alone["counts"]
    expected, found = (read_jsonl(path / "drafter" / "counts.jsonl") for path in (evaluated / "evaluate", tmp_path))
    for row in expected:  # the target's probabilities are rounded otherwise in a batch
        row.update(dict.fromkeys(TIMES), expected=pytest.approx(row["expected"]))
    assert found == expected
    samples = [read_jsonl(path / "drafter" / "samples.jsonl") for path in (evaluated / "evaluate", tmp_path)]
    assert samples[0] == samples[1]


def test_an_evaluation_by_two_rules_has_counts_and_texts_of_each(evaluated, tmp_path):
    folder = evaluated.parent
    how = ["evaluate.acceptance_rules=[ratio,argmax]", "+evaluate.sampling.temperature=2.0", "evaluate.batch_size=4"]
    how += [f"drafters=[{folder}/drafter]", f"out={tmp_path}", "evaluate.num_speculative_tokens=[3]"]
    stage("evaluate", [*command(folder), *how])
    (ratio,), (argmax,) = (read_evaluations(tmp_path, rule=rule) for rule in ("ratio", "argmax"))
    assert ratio.counts.keys() == argmax.counts.keys()
    assert sum(one.accepted for one in ratio.counts.values()) != sum(one.accepted for one in argmax.counts.values())
    samples = read_jsonl(tmp_path / "drafter" / "samples.jsonl")
    assert {sample.get("rule") for sample in samples} == {None, "argmax"}
    assert len(rows_by_rule(samples, "ratio")) == len(rows_by_rule(samples, "argmax"))


@pytest.mark.end_to_end
def test_the_tables_divide_the_counts_by_turn(evaluated, tmp_path):
    stage("tables", ["scale=smoke", "logger=csv", f"root={evaluated}", f"out={tmp_path}"])
    (line,) = (tmp_path / "tables" / "by_turn.md").read_text().splitlines()[4:5]
    rows = [row for row in read_jsonl(evaluated / "evaluate" / "drafter" / "counts.jsonl") if row["task"] == "chats"]
    sums = [[sum(row[name] for row in rows if row["turn"] == turn) for name in TAU] for turn in (1, 2)]
    assert [cell.split(" [")[0] for cell in line.strip("| ").split(" | ")[2:4]] == [f"{a / b:.2f}" for a, b in sums]


@pytest.mark.end_to_end
def test_the_best_gamma_is_found_on_all_turns(evaluated, tmp_path):
    folder = evaluated.parent
    how = ["gamma.largest=2", "gamma.prompts_per_task=20", f"gamma.drafter={folder}/drafter", f"out={tmp_path}"]
    stage("gamma", [*command(folder), *how])
    turns = {row["prompt"] for row in read_jsonl(tmp_path / "drafter" / "counts.jsonl") if row["task"] == "chats"}
    of_evaluation = read_jsonl(evaluated / "evaluate" / "drafter" / "counts.jsonl")
    assert turns == {row["prompt"] for row in of_evaluation if row["task"] == "chats"}


def test_a_dry_run_reads_the_conversations(evaluated, capsys):
    stage("prepare", [*command(evaluated.parent), "dry_run=true"])
    printed = capsys.readouterr().out
    assert "the first begins 'who saw the cat ? cat' (7 rows read, 3 used, 1 the chat template has" in printed
    assert "rows of [11, 11, 11] tokens" in printed  # with the system prompt
