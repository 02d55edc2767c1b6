"""Write the cache of the target's distributions from the config of a stage; see conf/cache.yaml."""

import logging

import hydra
from omegaconf import DictConfig

from drafter.artifacts import rows
from drafter.artifacts.manifest import read_manifest
from drafter.data.target_cache import ExactFormat, Format, write_cache
from drafter.models.loading import embedding_checksum, load_output_embedding, load_target
from drafter.models.sharding import check_parallel
from drafter.ranks import join, wait_for_all
from experiments.running.identity import named_values
from experiments.running.inputs import claim, plain, responses_fingerprint, target_inputs, target_named, target_source
from experiments.running.progress import Progress

log = logging.getLogger(__name__)


def cache(cfg: DictConfig) -> None:
    """Store the target's distributions. Run the target once over every response that does not have its states."""
    check(cfg)
    inputs = {"responses": responses_fingerprint(cfg), **target_inputs(cfg)}
    settings = {name: value for name, value in plain(cfg.cache).items() if name != "batch_tokens"}
    settings |= {"format": named_values(cfg.cache.format, "cache")}
    settings |= {"seed": cfg.seed, "target_dtype": cfg.target.dtype}
    stage = claim(cfg, "cache", settings, inputs)
    if stage.complete:
        return log.info("%s is up to date", cfg.out)
    ranks = join(cfg.target.parallel == "tensor")
    responses = rows.Rows(cfg.inputs.responses, "respond")
    format, source, with_states = format_of(cfg), target_source(cfg), count_states(cfg, responses)
    complete = with_states == len(responses)
    target = (load_output_embedding(source) if complete else load_target(source)).to(ranks.device)
    with Progress("cache", "row", ranks.world_size) as progress:
        count, schema = write_cache(
            target,
            responses,
            stage.folder,
            format,
            batch_tokens=cfg.cache.batch_tokens,
            shard_size=cfg.cache.shard_size,
            seed=cfg.seed,
            world_size=ranks.world_size,
            writes=ranks.writes,
            report=progress,
            take_states=with_states > 0,
        )
    head = embedding_checksum(target.get_output_embeddings())
    wait_for_all()
    if ranks.first:
        files, notes = rows.finish(stage.folder, count, schema)
        tokens = responses.response_tokens
        size = sum(size for name, size in stage.folder.sizes().items() if name.endswith(".arrow"))
        counts = {
            "rows": len(responses),
            "tokens": tokens,
            "bytes_per_token": round(size / tokens, 1),
            "undecided_mass": sum(note["undecided_mass"] for note in notes) / tokens,
            "output_embedding": head,
            "taken_from_responses": sum(note.get("taken", 0) for note in notes),
            "by": read_manifest(cfg.inputs.responses, "respond")["settings"].get("by", "target"),
            "target": target_named(cfg),
        }
        stage.finish(files, counts)
        log.info("%s: %s", cfg.out, counts)
    wait_for_all()  # the next stage of this process may read the cache


def count_states(cfg: DictConfig, responses: rows.Rows) -> int:
    """Return how many responses have the states that this cache stores, from the target in the same precision."""
    manifest, format = read_manifest(cfg.inputs.responses, "respond"), format_of(cfg)
    if not isinstance(format, ExactFormat) or manifest["settings"]["target_dtype"] != cfg.target.dtype:
        return 0
    found: int = manifest["counts"].get("with_states", 0)
    same = "hidden" in responses.schema.names and responses.schema.field("hidden").equals(format.field(), True)
    return found if same else 0


def format_of(cfg: DictConfig) -> Format:
    """Build the cache's format. Its `kind` is a label of the config and not an argument of the constructor."""
    fields = {name: value for name, value in plain(cfg.cache.format).items() if name != "kind"}
    found: Format = hydra.utils.instantiate(fields)
    return found


def check(cfg: DictConfig) -> None:
    """Refuse a way of splitting the target that this stage does not support."""
    check_parallel(cfg.target.parallel, "tensor", "cache")
