"""Make assets/tiny-target, the chat model of the embedded default, with this project's own Pretraining module.

`python -m experiments.tiny_target` or `make tiny-target`. When it is interrupted, the same command continues from the
last checkpoint. The model that it makes is in the repository, so no other command needs this one to have run.
"""

import logging
import shutil
from collections import Counter
from pathlib import Path

import hydra
import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from drafter.data.batches import Sequence
from drafter.data.corpus import Doc, extract, is_heldout, pack, pretraining_texts
from drafter.data.instructions import derive
from drafter.data.prompts import CHATML, encode_prompt
from drafter.models.initialization import build_drafter, special_ids
from drafter.models.loading import load_model, load_tokenizer, save_tokenizer
from drafter.training.datamodules import SequenceData
from drafter.training.modules import Pretraining, check_precision
from drafter.training.samples import InMemory, PackedText
from experiments.running.commands import command
from experiments.running.inputs import plain
from experiments.running.training import TrainingProgress

log = logging.getLogger(__name__)


@command("tiny_target")
def main(cfg: DictConfig) -> None:
    """Train the tokenizer, pack the text, pretrain, finetune on chats, and export."""
    check_precision(cfg.trainer.precision)
    work = Path(cfg.work)
    torch.set_float32_matmul_precision("high")
    docs = extract(list(cfg.data.packages), workers=2)
    parts = {
        "train": [doc for doc in docs if not is_heldout(doc.name, cfg.data.heldout_percent)],
        "heldout": [doc for doc in docs if is_heldout(doc.name, cfg.data.heldout_percent)],
    }
    if not (work / "base" / "tokenizer.json").exists():
        texts = list(pretraining_texts(parts["train"], cfg.data.code_share))
        train_tokenizer(texts, cfg.vocab_size, cfg.context).save_pretrained(work / "base")
    tokenizer = load_tokenizer(str(work / "base"))
    text, heldout = pack_parts(parts, tokenizer, cfg)
    if not (work / "base" / "model.safetensors").exists():
        lightning.seed_everything(cfg.seed)
        fields = plain(cfg.model)
        model = build_drafter(fields, len(tokenizer), special_ids(tokenizer, len(tokenizer)))
        train(model, SequenceData(text, heldout, cfg.batch_size, cfg.seed), "pretrain", cfg)
        model.save_pretrained(work / "base")
    model = load_model(str(work / "base"))
    chats, heldout_chats = (
        InMemory(chat_sequences(parts[part], tokenizer, cfg.chat[f"{part}_per_kind"], cfg)) for part in parts
    )
    train(model, SequenceData(chats, heldout_chats, 2 * cfg.batch_size, cfg.seed), "chat", cfg)
    export(model, tokenizer, cfg)


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with GPT-2's pre-tokenizer, which every serving engine knows, and ChatML's tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def pack_parts(parts: dict[str, list[Doc]], tokenizer: PreTrainedTokenizerFast, cfg: DictConfig) -> list[PackedText]:
    """Pack the pretraining text of each part, in an order shuffled once, so that texts of a package are spread out."""
    result = []
    for part, docs in parts.items():
        path = Path(cfg.work) / f"{part}.npy"
        if not path.exists():
            texts = list(pretraining_texts(docs, cfg.data.code_share))
            order = np.random.default_rng(cfg.seed).permutation(len(texts))
            pack(path, (texts[i] for i in order), tokenizer, tokenizer.bos_token_id)
        result.append(PackedText(path, cfg.pretrain.sequence_length))
        log.info("%s: %d tokens", path, len(result[-1].tokens))
    return result


def chat_sequences(
    docs: list[Doc], tokenizer: PreTrainedTokenizerFast, per_kind: int, cfg: DictConfig
) -> list[Sequence]:
    """Return prompts with reference answers, shuffled, at most `per_kind` per kind; only answers are predicted."""
    instructions = [instruction for doc in docs for instruction in derive(doc)]
    chosen: Counter[str] = Counter()
    sequences = []
    for index in np.random.default_rng(cfg.seed).permutation(len(instructions)):
        row = instructions[index]
        if chosen[row.kind] >= per_kind:
            continue
        chosen[row.kind] += 1
        prompt = encode_prompt(tokenizer, row.prompt)
        answer = tokenizer(row.reference, add_special_tokens=False)["input_ids"]
        ids = np.array([*prompt, *answer, tokenizer.eos_token_id])
        if len(ids) <= cfg.context:
            sequences.append(Sequence(ids, len(prompt), is_text=True))
    return sequences


def train(model: PreTrainedModel, data: SequenceData, stage: str, cfg: DictConfig) -> None:
    """Run the Pretraining module once, from its last checkpoint if there is one."""
    settings, folder = cfg[stage], Path(cfg.work) / stage
    steps = cfg.max_steps or settings.steps
    trainer = hydra.utils.instantiate(
        cfg.trainer,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=min(steps, cfg.validate_every),
        check_val_every_n_epoch=None,
        limit_val_batches=40,
        enable_progress_bar=False,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=200, save_last=True, save_top_k=0),
            TrainingProgress(stage),
        ],
    )
    last = folder / "last.ckpt"
    trainer.fit(Pretraining(model, settings.learning_rate), data, ckpt_path=str(last) if last.exists() else None)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cfg: DictConfig) -> None:
    """Write the model in bfloat16 with its tokenizer and generation config, and the logs of its training."""
    out = Path(cfg.out)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    for stage in ("pretrain", "chat"):
        shutil.copy(Path(cfg.work) / stage / "metrics.csv", out / f"{stage}-metrics.csv")
    log.info("wrote %s: %.1f MB", out, (out / "model.safetensors").stat().st_size / 1e6)


if __name__ == "__main__":
    main()
