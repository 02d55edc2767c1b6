"""The paper's data and tokenizer, tested on real rows where available. Licences keep them out of the project."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from drafter.artifacts.manifest import read_jsonl
from drafter.models.loading import load_tokenizer
from experiments import pipeline
from tests.conftest import write_jsonl
from tests.experiments.test_pipeline import stage

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        not DATA.exists(), reason="real rows of Dolly, XSum, CNN/DailyMail, WMT and OpenAssistant are not available"
    ),
]


def jsonl(name):
    return [json.loads(line) for line in (DATA / "prompts" / name).read_text().splitlines()]


def dolly(prompt):
    """Return the fields from which an Alpaca prompt was made."""
    found = re.search(r"### Instruction:\n(.*?)\n\n(?:### Input:\n(.*?)\n\n)?### Response:", prompt, re.S)
    return {"instruction": found[1], "context": found[2] or ""}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Write the hub's data sets and Llama 2's tokenizer and config as local files; return the overrides to use them."""
    folder = tmp_path_factory.mktemp("mirror")
    books = [path.read_text() for path in sorted((DATA / "text").glob("*.txt"))]
    first = {"role": "prompter", "parent_id": None, "lang": "en"}
    seeds = [(row["instruction"], row["instances"][0]["output"]) for row in jsonl("self_instruct_seeds.jsonl")]
    asked = [(row["category"], row["turns"][0]) for row in jsonl("spec_bench.jsonl")]
    articles = [text.removeprefix("Summarize: ") for kind, text in asked if kind == "summarization"]
    german = [text.removeprefix("Translate German to English: ") for kind, text in asked if kind == "translation"]
    sets = {
        "text": [{"text": part} for book in books for part in book.split("\n\n\n")],
        "oasst": [first | {"text": text} for text in jsonl("openassistant_250.jsonl")],
        "oig": [{"user": user, "chip2": chip2} for user, chip2 in seeds],
        "dolly": [dolly(row["prompt"]) for row in jsonl("dolly_151.jsonl")],
        "xsum": [{"document": row["article"].removeprefix("###\nArticle: ")} for row in jsonl("xsum_100.jsonl")],
        "cnn_dailymail": [{"article": article} for article in articles],
        "wmt18_de_en": [{"translation": {"de": text}} for text in german],
    }
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    for path in (DATA / "llama2_tokenizer").glob("*.json"):
        shutil.copy(path, folder)
    shape = yaml.safe_load(Path("conf/target/llama2_7b_chat.yaml").read_text())["target_shape"]
    del shape["of"]
    (folder / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    tasks = [f"task.{name}.path={folder}/{name}.jsonl" for name in ("dolly", "xsum", "cnn_dailymail", "wmt18_de_en")]
    return [
        "scale=llama2", "trainer=auto", "logger=csv", f"target.path={folder}", "target.revision=null",
        f"data.pretraining.path={folder}/text.jsonl", f"data.instructions.oig.path={folder}/oig.jsonl",
        f"data.instructions.oasst.path={folder}/oasst.jsonl", *tasks,
    ]  # fmt: skip


def test_the_papers_setting_dry_runs_on_real_rows_with_the_real_tokenizer(mirror, tmp_path, capsys):
    pipeline.main([*mirror, f"root={tmp_path}", "losses=[tvdpp]", "dry_run=true"])
    told = capsys.readouterr().out
    assert "LlamaForCausalLM, 6,738,415,616 parameters, context 4,096" in told
    assert "tokenizer: 32,000 tokens, 32,000 rows" in told
    assert "c = 1.74%" in told


def test_the_papers_data_are_prepared_from_real_rows_and_decode_to_their_texts(mirror, tmp_path):
    stage("prepare", [*mirror, f"root={tmp_path}", "scale.heldout_tokens=2000", "data.heldout_percent=5"])
    tokenizer = load_tokenizer(next(one for one in mirror if one.startswith("target.path")).partition("=")[2])
    tasks = read_jsonl(tmp_path / "data" / "tasks.jsonl")
    assert {row["task"] for row in tasks} == {"dolly", "xsum", "cnn_dailymail", "wmt18_de_en"}
    assert all(len(tokenizer(row["prompt"])["input_ids"]) < 1900 for row in tasks)
    german = next(row["prompt"] for row in tasks if row["task"] == "wmt18_de_en")
    assert german.startswith("Translate the following German text to English.\n\n")
    assert tokenizer.decode(tokenizer(german)["input_ids"], skip_special_tokens=True) == german
    kinds = {row["kind"] for row in read_jsonl(tmp_path / "data" / "instructions.jsonl")}
    assert kinds == {"oig", "oasst"}
