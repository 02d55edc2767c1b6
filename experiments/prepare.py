"""Stage 0: prepare text, instructions and evaluation prompts with the target's tokenizer. Config: conf/prepare.yaml."""

import logging
import os

from omegaconf import DictConfig

from drafter.artifacts.manifest import Stage, write_jsonl
from drafter.data.conversations import opening
from drafter.data.corpus import pack
from drafter.data.near_duplicates import SeenTexts
from drafter.data.prompts import check_embedding
from drafter.models.fingerprints import tokenizer_fingerprint
from drafter.models.loading import load_tokenizer, vocabulary_width
from drafter.ranks import wait_for_all
from experiments.running import dry_run
from experiments.running.choosing import choose_instructions, choose_prompts, encodes_text
from experiments.running.commands import command
from experiments.running.data_settings import check_kinds, identity
from experiments.running.data_sources import gather
from experiments.running.inputs import claim, target_source
from experiments.running.progress import Progress
from experiments.running.self_writing import check_sources, write_sources

log = logging.getLogger(__name__)


@command("prepare")
def main(cfg: DictConfig) -> None:
    """Write train.npy and heldout.npy, instructions.jsonl and tasks.jsonl.

    What the target is to write itself comes first; all ranks share that work, and the first one does the rest.
    """
    if cfg.dry_run:
        return dry_run.show(cfg, "prepare", check)
    check(cfg)
    write_sources(cfg)
    settings, files = identity(cfg)
    stage = claim(cfg, "prepare", settings, {"tokenizer": tokenizer_fingerprint(target_source(cfg)), **files})
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    if int(os.environ.get("RANK", 0)) == 0:
        prepare(cfg, stage)
    wait_for_all()


def prepare(cfg: DictConfig, stage: Stage) -> None:
    """Choose the instructions and prompts, then pack the text.

    Instructions and prompts come first, because they can be refused, and packing the text takes much longer.
    """
    tokenizer = load_tokenizer(target_source(cfg))
    protected = SeenTexts()
    data = gather(cfg, encodes_text(tokenizer), protected)
    instructions = choose_instructions(cfg, data.instructions, data.weights, tokenizer)
    prompts = choose_prompts(cfg, data.tasks, tokenizer)
    tallies = {f"instructions {name}": tally for name, tally in instructions.tallies.items()}
    tallies |= {f"task {name}": selection.tallies[name] for name, selection in prompts.items()}
    for name, tally in tallies.items():
        log.info("%s: %s", name, tally)
    chosen = [{**row, "split": split} for split in ("train", "validation") for row in instructions.rows[split]]
    tasks = [{**row, "task": task} for task, selection in prompts.items() for row in selection.rows[task]]
    for row in [*instructions.rows["validation"], *tasks]:
        protected.reason_against(opening(row))
    write_jsonl(stage.directory / "instructions.jsonl", chosen)
    write_jsonl(stage.directory / "tasks.jsonl", tasks)
    counts = {"instructions": len(chosen), "prompts": len(tasks)}
    end = tokenizer.eos_token_id
    if end is None:
        log.warning("the tokenizer has no end-of-text token, so packed texts follow each other without a separator")
    for part, limit in (("heldout", cfg.prepare.heldout_tokens), ("train", cfg.prepare.pretraining_tokens)):
        with Progress(f"prepare {part} text", "token") as progress:
            written = pack(stage.directory / f"{part}.npy", data.texts[part], tokenizer, end, limit, progress)
        for name, tally in data.text_tallies.items():
            if name.split()[0] == part:
                tallies[f"text {name}"] = tally
                log.info("text %s: %s", name, tally)
        if written == 0:
            raise ValueError(f"the corpus is empty: data '{cfg.data.name}' gave no {part} text")
        counts[f"{part}_tokens"] = written
    stage.finish(counts=counts | {"rows": {name: tally.counts() for name, tally in tallies.items()}})
    log.info("%s: %s", cfg.out, counts)


def check(cfg: DictConfig) -> None:
    """Check the target's tokenizer, and the settings of the data before the target writes any of them.

    Raises:
        ValueError: the tokenizer produces ids outside of the embedding, a setting of the data is wrong, or the target
            cannot write instructions.
    """
    source = target_source(cfg)
    tokenizer = load_tokenizer(source)
    check_embedding(tokenizer, vocabulary_width(source), source.path)
    check_kinds(cfg)
    check_sources(cfg, tokenizer)


if __name__ == "__main__":
    main()
