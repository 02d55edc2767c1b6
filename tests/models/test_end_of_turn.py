"""The ids that end a turn, for chat templates like those of published models, and for sources that differ."""

import json
import shutil
from pathlib import Path

import pytest

from drafter.models.end_of_turn import end_of_turn_ids, template_end
from drafter.models.loading import load_tokenizer
from experiments.tiny_target import train_tokenizer
from tests.conftest import save_target

TINY = Path("assets/tiny-target")


def turns(user, assistant, start="{{ bos_token }}"):
    """Return a chat template from a text for a user's turn and one for an assistant's."""
    role = "{% if m['role'] == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}"
    return start + "{% for m in messages %}" + role.replace("TEXT", "{{ m['content'] | trim }}") + "{% endfor %}"


TEMPLATES = {
    "ChatML": ("<|im_end|>", turns("<|im_start|>user\nTEXT<|im_end|>\n", "<|im_start|>assistant\nTEXT<|im_end|>\n")),
    "Llama 3": ("<|eot_id|>", turns("<|h|>user<|/h|>\n\nTEXT<|eot_id|>", "<|h|>assistant<|/h|>\n\nTEXT<|eot_id|>")),
    "Gemma": ("<end_of_turn>", turns("<start>user\nTEXT<end_of_turn>\n", "<start>model\nTEXT<end_of_turn>\n")),
    "Llama 2": ("</s>", turns("<s>[INST] TEXT [/INST]", " TEXT </s>")),
    "Phi": ("<|end|>", turns("<|user|>\nTEXT<|end|>\n", "<|assistant|>\nTEXT<|end|>\n")),
    "Mistral": ("</s>", turns("[INST]TEXT[/INST]", "TEXT</s>")),
    "DeepSeek": ("<｜end▁of▁sentence｜>", turns("<｜User｜>TEXT", "<｜Assistant｜>TEXT<｜end▁of▁sentence｜>")),
    "the end after a line": ("<|EOT|>", turns("### Instruction:\nTEXT\n", "### Response:\nTEXT\n<|EOT|>\n")),
    "the longer of two": ("<|end|>x", turns("TEXT", "TEXT<|end|>x")),
    "no control token": (None, turns("User: TEXT\n", "Assistant: TEXT\n")),
    "only words": (None, turns("TEXT", "TEXT")),
    "no assistant": (None, turns("TEXT<|end|>", "{{ raise_exception('a user has to speak last') }}")),
    "content left out": (None, turns("TEXT<|end|>", "<|end|>")),
}
PIECES = ["<|eot_id|>", "<end_of_turn>", "</s>", "<s>", "<|end|>", "<|end|>x", "<｜end▁of▁sentence｜>", "<|EOT|>"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["the area of a rectangle"], 300, 64)
    tokenizer.add_special_tokens({"additional_special_tokens": PIECES[:-1]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(PIECES[-1:])  # added, but not as a special token
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_control_token_after_the_assistants_content_is_found(tokenizer, name):
    wanted, tokenizer.chat_template = TEMPLATES[name]
    assert template_end(tokenizer) == (None if wanted is None else tokenizer.convert_tokens_to_ids(wanted))


def test_without_a_template_there_is_no_template_end(tokenizer):
    tokenizer.chat_template = None
    assert template_end(tokenizer) is None


def ends(path, generation=None, config=None):
    """Return the ids of the embedded target with changed fields; None removes a field, "remove" the file."""
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in (("generation_config.json", generation), ("config.json", config)):
        if change == "remove":
            (path / name).unlink()
        else:
            fields = json.loads((path / name).read_text()) | (change or {})
            (path / name).write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return end_of_turn_ids(str(path), load_tokenizer(str(path)))


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, None, [2]),
        ({"eos_token_id": 0}, None, [2, 0]),  # the base model's end, beside the chat's
        ({"eos_token_id": [0, 2, 5]}, None, [2, 0, 5]),
        ({"eos_token_id": [0, 4096]}, None, [2, 0]),  # beyond the embedding
        ({"eos_token_id": None}, {"eos_token_id": 5}, [2, 5]),
        ("remove", {"eos_token_id": [5, 6]}, [2, 5, 6]),
        ("remove", {"eos_token_id": None}, [2]),
    ],
)
def test_the_ends_are_those_of_template_tokenizer_and_config_combined(tmp_path, generation, config, wanted):
    assert ends(tmp_path / "model", generation, config) == wanted


def test_the_templates_end_is_the_first_and_the_tokenizers_the_second(tmp_path):
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.eos_token = "<|im_start|>"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert end_of_turn_ids(str(tmp_path / "model"), tokenizer) == [end, start]
    tokenizer.chat_template = None
    assert end_of_turn_ids(str(tmp_path / "model"), tokenizer) == [start, end]


def test_a_model_without_an_end_gets_one_warning(tmp_path, caplog):
    save_target(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"eos_token_id": None}))
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.eos_token = None
    assert end_of_turn_ids(str(tmp_path), tokenizer) == []
    assert [record.levelname for record in caplog.records if record.name == "drafter.models.end_of_turn"] == ["WARNING"]
    assert f"nothing ends a response of {tmp_path}" in caplog.text
