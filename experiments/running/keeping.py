"""Choose the tokens that a drafter is trained with: the settings `kept_tokens` and `sampled_tokens`.

A drafter that is trimmed already keeps its tokens. Otherwise they are the most frequent ones of the texts, with the ids
that end a response. Every rank computes the same list, from the same texts. If others are sampled in each step, the
drafter is to propose all tokens, and is not trimmed.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from drafter.artifacts.manifest import read_manifest, require
from drafter.artifacts.rows import Rows
from drafter.losses.trimmed import Kept, SampledTokens
from drafter.models.end_of_turn import end_of_turn_ids
from drafter.models.loading import load_tokenizer, vocabulary_width
from drafter.models.trimming import most_used, read_kept
from experiments.running.inputs import responses_fingerprint, target_source
from experiments.running.jobs import Job

COUNTED, PARTS = 10**8, 1000  # a longer text is counted in so many parts of equal distance, of so many tokens together


def check_kept(cfg: DictConfig, section: str, drafter: str | None) -> bool:
    """Return whether a stage trains with some tokens alone, after checking `kept_tokens` and `sampled_tokens`.

    Args:
        cfg: the config of the stage.
        section: the name of its section.
        drafter: the directory that training starts from, if it is one of a drafter.

    Raises:
        ValueError: a number is out of range, the drafter keeps another number of tokens, or tokens are to be sampled
            although none are kept or the drafter is trimmed.
    """
    number, own = cfg[section].kept_tokens, read_kept(drafter) if drafter else None
    rows = vocabulary_width(target_source(cfg))
    if number is not None and not 0 < number < rows:
        raise ValueError(
            f"{section}.kept_tokens is {number}, must be above 0 and below the {rows} rows of the embedding, or null "
            f"for all"
        )
    if own and number not in (None, len(own)):
        raise ValueError(
            f"{section}.kept_tokens is {number}, but {drafter} is trimmed to {len(own)} tokens, which it keeps: give "
            f"null, or the drafter that it was made from"
        )
    sampled = cfg[section].sampled_tokens
    if sampled is None:
        return bool(own or number)
    given = f"{section}.sampled_tokens is {sampled}"
    if own:
        raise ValueError(
            f"{given}, but {drafter} is trimmed to {len(own)} tokens, and the rows of the others may be untrained: "
            f"give null, or a drafter that proposes all tokens"
        )
    if number is None:
        raise ValueError(f"{given}, but {section}.kept_tokens is null: give the number of tokens of every step")
    if not 0 < sampled <= rows - number:
        raise ValueError(
            f"{given}, must be above 0 and at most {rows - number}, the rows of the embedding that are not among "
            f"{section}.kept_tokens"
        )
    return True


def check_stages(jobs: Iterable[Job]) -> None:
    """Check that what the stages of a pipeline make suits the tokens that later stages train with.

    Raises:
        ValueError: names the settings.
    """
    all_jobs = list(jobs)
    for job in all_jobs:
        if job.stage == "finetune" and job.cfg.finetune.sampled_tokens:
            check_start_is_whole(job, all_jobs)
    trimmed = [job for job in all_jobs if job.stage in ("pretrain", "finetune") and job.cfg[job.stage].kept_tokens]
    sparse = any(job.stage == "cache" and job.cfg.cache.format.kind == "sparse" for job in all_jobs)
    if trimmed and sparse and any(job.stage == "finetune" and job.cfg.inputs.cache for job in all_jobs):
        raise ValueError(
            f"{trimmed[0].stage}.kept_tokens is {trimmed[0].cfg[trimmed[0].stage].kept_tokens}, and a sparse cache has "
            f"no distribution over the kept tokens: use an exact cache (cache=exact) or a live target "
            f"(inputs.cache=null)"
        )


def check_start_is_whole(finetuning: Job, jobs: Iterable[Job]) -> None:
    """Check that the drafter that a finetuning starts from will propose all tokens.

    Raises:
        ValueError: another job of the pipeline makes it, and trims it.
    """
    for job in jobs:
        if job.stage == "pretrain" and job.cfg.out == finetuning.cfg.inputs.drafter:
            number, sampled = job.cfg.pretrain.kept_tokens, job.cfg.pretrain.sampled_tokens
            if number is not None and sampled is None:
                raise ValueError(
                    f"finetune.sampled_tokens is {finetuning.cfg.finetune.sampled_tokens}, but pretrain.kept_tokens is "
                    f"{number} and would trim the drafter before: give pretrain.sampled_tokens too"
                )


class Chosen(NamedTuple):
    """The tokens that a drafter is trained with.

    Attributes:
        kept: the tokens that it is to propose; None: all.
        sampled: the tokens of each step, if it is to propose all and is trained with some; else None.
    """

    kept: Kept | None = None
    sampled: SampledTokens | None = None


def choose_tokens(cfg: DictConfig, section: str, drafter: str | None, texts: Iterable[Any]) -> Chosen:
    """Return the tokens to train with.

    Args:
        cfg: the config of the stage.
        section: the name of its section.
        drafter: the directory that training starts from, if it is one of a drafter.
        texts: the token ids whose frequencies decide; they are read only if these do decide.
    """
    number, ids = cfg[section].kept_tokens, read_kept(drafter) if drafter else None
    source = target_source(cfg)
    rows = vocabulary_width(source)
    if not ids and number is not None:
        stops = end_of_turn_ids(source, load_tokenizer(source))
        ids = list(dict.fromkeys([*stops, *most_used(texts, rows).tolist()]))[:number]
    kept, sampled = Kept.from_ids(ids, rows) if ids else None, cfg[section].sampled_tokens
    return Chosen(kept) if kept is None or sampled is None else Chosen(None, SampledTokens(kept, sampled, cfg.seed))


def training_responses(cfg: DictConfig) -> Iterator[list[int]]:
    """Yield the response tokens of the rows for training, reading a thousand rows at a time.

    Raises:
        ArtifactError: there are no responses of this target, or the cache was made from others.
    """
    found = responses_fingerprint(cfg)
    if cfg.inputs.get("cache"):
        made_from = read_manifest(cfg.inputs.cache, "cache")["inputs"]["responses"]
        require(cfg.inputs.cache, "responses", made_from, found)
    rows = Rows(cfg.inputs.responses, "respond")
    selected = np.flatnonzero(rows.splits == "train")
    for start in range(0, len(selected), 1000):
        for row in rows.read(selected[start : start + 1000].tolist()):
            yield row["response_ids"]


def packed_text(path: Path) -> Iterator[np.ndarray]:
    """Yield parts of a file of packed tokens, evenly spaced if it is long."""
    tokens = np.load(path, mmap_mode="r")
    size = max(1, min(len(tokens), COUNTED) // PARTS)
    for start in np.linspace(0, max(0, len(tokens) - size), PARTS).astype(int):
        yield np.asarray(tokens[start : start + size])
