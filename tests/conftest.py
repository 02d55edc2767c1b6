"""Fixtures that several tests share: small models with random weights, and a finished run of all stages."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from drafter.artifacts.rows import Rows
from drafter.data.batches import response_sequence

VOCABULARY = 64
WORDS = "<end> <unk> the cat dog saw a bird who and then ran to tree house what did do ? .".split()  # noqa: SIM905


def small_model(seed=0, hidden=16, layers=1, vocab=VOCABULARY, sharpness=1.0):
    """Return a Llama with random weights. The higher the sharpness, the less uniform its distributions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model.requires_grad_(False).eval()


def capped(model):
    """Return a model with the same weights that caps its logits after the output embedding, as Gemma 2 does."""

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * torch.tanh(output.logits / 2)
            return output

    result = Capped(model.config).eval()
    result.load_state_dict(model.state_dict())
    return result.requires_grad_(False)


@pytest.fixture(scope="session")
def target():
    """Return the larger model of a pair over 64 tokens."""
    return small_model(seed=1, hidden=32, layers=2, sharpness=60.0)


@pytest.fixture(scope="session")
def drafter():
    """Return the smaller model of the pair."""
    return small_model(seed=2, hidden=16, layers=1, sharpness=60.0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, so that results and times do not depend on other processes."""
    torch.set_num_threads(1)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_target(folder, words=WORDS, seed=0, positions=64):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    # Like many published models, this one has more embedding rows than its tokenizer has tokens.
    config = GPT2Config(
        vocab_size=24, n_positions=positions, n_embd=32, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wte.weight.data.mul_(8)  # peaked, but not so much that temperatures make no difference
    model.save_pretrained(folder)


def save_llama(folder, tokenizer):
    """Save a Llama with the tokenizer of `save_target`."""
    model = small_model(3, hidden=32, layers=2, vocab=24, sharpness=60.0)
    model.generation_config.eos_token_id = 0
    model.lm_head.weight.data[len(WORDS) :] = 0  # makes padding unlikely
    model.save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)


def save_pair(folder):
    """Save a target, and a drafter of another architecture with the same tokenizer."""
    save_target(folder / "target")
    (folder / "drafter").mkdir()
    save_llama(folder / "drafter", folder / "target")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Finish a run of every stage with a GPT-2 and local files. Return its overrides and its root directory."""
    folder = tmp_path_factory.mktemp("world")
    save_target(folder / "target")
    sentences = [
        f"the {a} saw a {b} and then ran to the {c} ." for a in WORDS[3:5] for b in WORDS[3:8] for c in WORDS[11:14]
    ]
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in sentences * 12])
    write_jsonl(
        folder / "asked.jsonl",
        [
            {
                "prompt": f"what did the {WORDS[3 + i % 6]} do {'? ' * (i % 40 + 1)}",
                "answer": f"the {WORDS[3 + i % 5]} ran",
            }
            for i in range(240)
        ],
    )
    write_jsonl(folder / "task.jsonl", [{"question": f"who saw the {word} ?"} for word in WORDS[3:7]])
    task = f"{{path: {folder}/task.jsonl, split: train, name: null, revision: null, template: '{{question}}', "
    overrides = [
        "scale=smoke",
        "data=files",
        "task=files",
        f"task.prompts.path={folder}/task.jsonl",
        "task.prompts.template='{question}'",
        "task.prompts.max_new_tokens=8",
        "logger=csv",
        f"root={folder}/run",
        f"target.path={folder}/target",
        f"data.pretraining.path={folder}/text.jsonl",
        f"data.instructions.questions.path={folder}/asked.jsonl",
        "data.instructions.questions.reference='{answer}'",
        "data.heldout_percent=25",
        "drafter.max_position_embeddings=64",
        "scale.sequence_length=16",
        "scale.heldout_tokens=400",
        "scale.max_prompt_tokens=48",
        "scale.max_new_tokens=8",
        "scale.pretrain_steps=10",
        "scale.finetune_steps=6",
        "++task.sampled=" + task + "temperature: 0.6, top_p: 0.9, max_new_tokens: 8, in_domain: true}",
    ]
    from experiments.pipeline import main

    main([*overrides, "losses=[kld,tvdpp]", "seeds=[1]"])
    return overrides, folder / "run"


def answered(prompt_ids, response_ids, temperature=1.0, cached=None):
    """Return a sample of a prompt and its response, with the target's distributions if they are given."""
    row = {"prompt_ids": prompt_ids, "response_ids": response_ids, "temperature": temperature}
    return response_sequence(row, cached)


def finished_rows(folder, files, stage):
    """Write a manifest that declares a folder complete, and return its rows."""
    folder.write("manifest.json", json.dumps({"stage": stage, "files": files}).encode())
    return Rows(folder.url, stage)
