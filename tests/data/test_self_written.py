"""The target writes messages: which are kept, how many rounds there are, and that interruptions change nothing."""

from collections import Counter

import pytest
import torch

from drafter.artifacts.storage import Folder
from drafter.data import self_written
from drafter.data.engines import Limits, transformers_engine
from drafter.data.self_written import Collection, Writer, is_degenerate, write_until_enough
from drafter.data.steering import Recipe
from drafter.ranks import Ranks
from tests.chat_target import VOCABULARY, chat_model, chat_tokenizer

STOP = VOCABULARY.index("<|stop|>")
KNOWN = set(range(len(VOCABULARY)))
ALONE = Ranks(0, 1, torch.device("cpu"))


def ids(text):
    return [VOCABULARY.index(word) for word in text.split()]


def stubbed(*messages, **recipe):
    """Return a writer whose target writes these messages in turn."""
    return Writer(Recipe("mine", 0, 1.0, **recipe), chat_tokenizer(), lambda requests: list(messages), [STOP, 0], KNOWN)


@pytest.mark.parametrize(
    ("tokens", "text", "reason"),
    [
        (ids("who saw the cat ? <|stop|>"), "who saw the cat ?", ""),
        (ids("who saw the cat ? <end>"), "who saw the cat ?", ""),
        (ids("who saw the cat ?"), "who saw the cat ?", "too long"),
        (ids("<|stop|>"), "", "empty"),
        ([], "", "too long"),
        (ids("who <|reply|> the cat <|stop|>"), "who <|reply|> the cat", "with control tokens"),
        ([*ids("who saw"), len(VOCABULARY) + 1, STOP], "", "with an id that the tokenizer or the target does not have"),
        (ids("? . ! <|stop|>"), "? . !", "degenerate"),
        (ids("what did the cat cat cat cat cat cat <|stop|>"), "what did the cat cat cat cat cat cat", "degenerate"),
    ],
)
def test_each_reason_for_leaving_a_message_out(tokens, text, reason):
    assert stubbed().read(tokens) == (text, reason)


def test_control_tokens_spelled_in_ordinary_tokens_are_found(monkeypatch):
    writer = stubbed()
    monkeypatch.setattr(writer, "tokenizer", type("Spelling", (), {"decode": lambda *_, **__: "why <|stop|> ?"})())
    assert writer.read(ids("why ? <|stop|>")) == ("why <|stop|> ?", "with control tokens")


def test_a_turn_that_ends_with_text_is_cut_there():
    tokens = ids("why did the dog ran ? the answer is <|reply|>".replace("answer is", "man"))
    assert stubbed().read(tokens, end_text="? the") == ("why did the dog ran", "")
    assert stubbed().read(tokens, end_text="none")[1] == "too long"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I bake bread without an oven?", False),
        ("List ten words, then ten more words, then ten numbers.", False),
        ("1 + 1 = ?", True),
        ("good good good good good", True),
        ("abc" * 30, True),
        ("一二三四五六七八九十" * 3, False),
        ("为什么天空是蓝色的？", False),
        ("Bad bytes \ufffd here", True),
    ],
)
def test_what_is_degenerate(text, expected):
    assert is_degenerate(text) == expected


def test_system_prompts_and_examples_take_turns():
    recipe = Recipe("mine", 0, 1.0, ("one", None), ("a", "b", "c"), shown=2)
    before = [recipe.before(number) for number in range(6)]
    assert [messages[0]["content"] for messages in before] == ["one", "a", "one", "b", "one", "c"]
    asked = [[message["content"] for message in messages if message["role"] == "user"] for messages in before]
    assert asked == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "c"], ["c", "a"], ["c", "a"]]


def test_the_answers_to_requests_are_the_messages_and_requests_take_turns():
    asked = []
    recipe = Recipe("mine", 0, 1.0, ("who", None), requests=("what ?", "why ?", "who ?"))
    writer = Writer(recipe, chat_tokenizer(), lambda requests: asked.extend(requests) or [[STOP]] * 12, [STOP], KNOWN)
    writer.write(0, 12)
    prompts = {request.id: chat_tokenizer().decode(request.prompt_ids) for request in asked}
    assert [prompts[f"mine:00000-{number:04d}"].split()[-4:-2] for number in range(0, 12, 2)] == [
        ["what", "?"], ["why", "?"], ["who", "?"], ["what", "?"], ["why", "?"], ["who", "?"]
    ]  # fmt: skip
    assert all(prompt.endswith("<|reply|>") for prompt in prompts.values())
    assert recipe.period == len(set(prompts.values())) == 6
    assert [request.prompt_ids for request in asked] == sorted(request.prompt_ids for request in asked)


def test_responses_belong_to_their_requests_whatever_the_order_of_the_prompts():
    recipe = Recipe("mine", 0, 1.0, requests=("why ?", "who ?", "what ?"))
    writer = Writer(
        recipe, chat_tokenizer(), lambda found: [[*one.prompt_ids[1:2], STOP] for one in found], [STOP], KNOWN
    )
    rows = writer.write(0, 6)
    assert [row["text"] for row in rows] == ["why", "who", "what"] * 2
    assert [row["id"] for row in rows] == [f"mine:00000-{number:04d}" for number in range(6)]


@pytest.mark.parametrize(
    ("words", "text", "reason"),
    [
        ("the cat ran . the dog", "the cat ran .", ""),
        ("the cat ran . the dog ran !", "the cat ran . the dog ran !", ""),
        ("the cat ran . the dog <|stop|>", "the cat ran . the dog", ""),
        ("the cat ran", "the cat ran", "too long"),
    ],
)
def test_an_answer_to_a_request_that_reaches_the_limit_ends_with_its_last_complete_sentence(words, text, reason):
    assert stubbed(requests=("why ?",)).read(ids(words)) == (text, reason)


def test_duplicates_are_counted_in_the_order_of_the_shards_and_what_is_beyond_the_number_is_not_needed():
    messages = ["who saw the cat ?", "Who saw the cat", "who saw the cats ?", "why ?", "what then ?"]
    collection = Collection(2)
    collection.add([{"text": text, "left_out": ""} for text in messages] + [{"text": "", "left_out": "empty"}])
    assert [row["text"] for row in collection.kept] == ["who saw the cat ?", "why ?"]
    counts = collection.counts()
    assert counts["left_out"] == {"duplicate": 1, "near duplicate": 1, "not needed": 1, "empty": 1}
    assert counts["generated"] == counts["written"] + sum(counts["left_out"].values()) == 6
    assert collection.shards_after(1, 6) == 1


def filled(wanted, kept, generated):
    collection = Collection(wanted)
    collection.add([{"text": f"question {chr(97 + number) * 9}", "left_out": ""} for number in range(kept)])
    collection.add([{"text": "", "left_out": "empty"} for _ in range(generated - kept)])
    return collection


def test_a_round_is_as_large_as_the_share_that_is_kept_asks_for():
    assert filled(wanted=40, kept=20, generated=40).shards_after(4, 10) == 4 + 5  # 22 more, 5 of each shard: 4.4
    assert filled(wanted=10_000, kept=20, generated=40).shards_after(4, 10) == 4 + 64  # no more than 16 times


def test_hardly_any_usable_message_is_an_error_and_a_warning_if_half_are_there(caplog):
    with pytest.raises(
        ValueError, match=r"only 1 of the last 100 messages .* 1 of 40 are there .*99 empty.*raise the temp"
    ):
        filled(wanted=40, kept=1, generated=100).shards_after(10, 10)
    collection = filled(wanted=36, kept=20, generated=40)
    assert collection.shards_after(4, 10) > 4
    collection.add([{"text": "", "left_out": "empty"} for _ in range(50)])
    assert collection.shards_after(9, 10) == 9
    assert "going on with these" in caplog.text


def chat_writer(with_answers=False):
    model = chat_model()
    engine = transformers_engine(model, Limits(0.95, 24, [STOP, 0]), batch_tokens=400)
    answer = transformers_engine(model, Limits(0.95, 8, [STOP, 0]), batch_tokens=400)
    recipe = Recipe("mine", 3, 1.0, with_answers=with_answers)
    return Writer(recipe, chat_tokenizer(), engine, [STOP, 0], KNOWN, answer if with_answers else None)


def content(folder):
    return {name: folder.read(name) for name in folder.sizes()}


@pytest.mark.parametrize("with_answers", [False, True])
def test_an_interrupted_run_and_any_order_of_the_shards_write_the_same(tmp_path, monkeypatch, with_answers):
    whole, resumed, ordered = (Folder(tmp_path / name) for name in ("whole", "resumed", "ordered"))
    how = {"first": 2, "size": 8, "ranks": ALONE}
    writer, expected = chat_writer(with_answers), Collection(20)
    count = write_until_enough(writer, whole, expected, **how)
    assert count > 2
    assert len(expected.kept) == 20
    assert expected.left_out["too long"]
    assert expected.counts()["generated"] == 8 * count

    written, write = [], writer.write

    def killed(shard, size):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return write(shard, size)

    monkeypatch.setattr(writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        write_until_enough(writer, resumed, Collection(20), **how)
    resumed.write("00002.arrow", b"a shard whose index was not written")
    monkeypatch.undo()
    again = Collection(20)
    assert write_until_enough(writer, resumed, again, **how) == count
    monkeypatch.setattr(self_written, "deal_shards", lambda numbers, size: enumerate(numbers[::-1]))
    reversed_ = Collection(20)
    assert write_until_enough(writer, ordered, reversed_, **how) == count
    assert content(whole) == content(resumed) == content(ordered)
    for other in (again, reversed_):
        assert [row["text"] for row in other.kept] == [row["text"] for row in expected.kept]
        assert other.left_out == expected.left_out


def test_answers_are_those_to_the_message_in_the_chat_template(tmp_path):
    asked = []

    def answer(requests):
        asked.extend(requests)
        return [ids("the cat <|stop|>"), ids("<|stop|>"), ids("a fox")]

    messages = [ids(text) for text in ("who ran ? <|stop|>", "why ? <|stop|>", "what did the <|stop|>", "who")]
    writer = Writer(
        Recipe("mine", 0, 1.0, with_answers=True), chat_tokenizer(), lambda _: messages, [STOP], KNOWN, answer
    )
    rows = writer.write(0, 4)
    assert asked[0].prompt_ids == ids("<|user|> who ran ? <|stop|> <|reply|>")
    assert Counter(row["left_out"] for row in rows) == {"": 2, "answer empty": 1, "too long": 1}
    assert [row["answer"] for row in rows] == ["the cat", "", "a fox", ""]
    assert [row["tokens"] for row in rows] == [7, 4, 6, 1]


def test_shards_and_sources_have_random_numbers_of_their_own():
    recipes = [Recipe(name, seed, 1.0) for name in ("a", "b") for seed in (0, 1)]
    seeds = {self_written.seed_of(recipe, shard) for recipe in recipes for shard in range(3)}
    assert len(seeds) == 12
