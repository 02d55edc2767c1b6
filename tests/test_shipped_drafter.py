"""The drafter in assets/, which `make chat` takes: it is complete, small, and drafts for SmolLM2-135M-Instruct."""

from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from drafter.artifacts.manifest import read_manifest
from drafter.models.copying import copying_weights
from drafter.models.inspection import num_parameters
from experiments.exporting.recipe import absolute_paths

SHIPPED = Path("assets/smollm2-drafter")


def test_it_has_what_engines_read_and_takes_little_space():
    names = {file.name for file in SHIPPED.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 20e6
    assert GenerationConfig.from_pretrained(SHIPPED).num_assistant_tokens >= 3


def test_its_card_names_the_licence_the_target_and_how_it_was_made():
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert read_manifest(SHIPPED, "export")["facts"]["training"]["distillation loss"].startswith("kld")
    assert not absolute_paths(SHIPPED / "README.md", SHIPPED / "manifest.json")


def test_its_vocabulary_is_the_targets_and_it_is_much_smaller():
    fields = yaml.safe_load(Path("conf/target/smollm2_135m.yaml").read_text())["target_shape"]
    del fields["of"]
    target = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        size = num_parameters(AutoModelForCausalLM.from_config(target))
    drafter = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    assert drafter.config.vocab_size == target.vocab_size == len(AutoTokenizer.from_pretrained(SHIPPED))
    assert num_parameters(drafter) < 0.04 * size


def test_it_drafts_a_text_better_when_it_is_repeated():
    """Its copying heads are held while it is trained: what has occurred before is drafted again."""
    drafter = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    assert list(copying_weights(drafter))
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = "The old lighthouse on Brannock Point was sold to a retired teacher, who plans to open a small museum there."
    once = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        found = drafter(torch.tensor([once * 2])).logits[0].argmax(-1).tolist()
    first, again = (
        sum(found[start + place - 1] == once[place] for place in range(3, len(once))) / (len(once) - 3)
        for start in (0, len(once))
    )
    assert again > first + 0.2
