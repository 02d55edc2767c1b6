"""The settings of the stage `respond`: their ranges, and those that belong to the identity of the responses."""

from typing import Any

from omegaconf import DictConfig

from drafter.data.columns import ARROW_TYPES
from drafter.data.dialogues import TURNS
from drafter.data.states import require_plain_head
from drafter.models.loading import meta_model
from drafter.models.sharding import check_parallel
from experiments.running.identity import without_defaults
from experiments.running.inputs import plain, target_source

BY = ("target", "drafter", "mixture", "reference", "log", "replay")
# Arguments of vllm.LLM that set memory and devices, and do not change the distribution of the responses.
VLLM_RESOURCES = {
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "swap_space",
    "cpu_offload_gb",
    "enforce_eager",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "block_size",
    "disable_log_stats",
}
# Settings that the identity has only where they differ from these values.
LEFT_OUT = {"states": None, "all_temperatures": False}


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that determine the responses and their files. Batch sizes are not among them."""
    settings = without_defaults(plain(cfg.respond), LEFT_OUT)
    del settings["batch_tokens"], settings["replay"]
    settings["vllm"] = {name: value for name, value in settings["vllm"].items() if name not in VLLM_RESOURCES}
    served = settings.pop("openai")
    if settings["engine"] == "openai":  # where the server is, and how it is asked, does not change the responses
        settings["openai"] = {"model": served["model"]}
    return {**settings, "seed": cfg.seed, "target_dtype": cfg.target.dtype}


def check(cfg: DictConfig) -> None:
    """Check the settings before a model is loaded.

    Raises:
        ValueError: a setting is out of range; names the setting and the range.
    """
    settings = cfg.respond
    if settings.engine == "openai":
        check_openai(cfg)
    check_parallel(cfg.target.parallel, "tensor", "respond")
    for name, allowed, wanted in (
        ("temperatures", settings.temperatures and min(settings.temperatures) >= 0, "0 (greedy) or above, one or more"),
        ("top_p", 0 < settings.top_p <= 1, "above 0, at most 1"),
        ("num_responses", settings.num_responses >= 10, "at least 10 (validation gets a tenth in addition)"),
        ("max_new_tokens", settings.max_new_tokens >= 1, "at least 1"),
        ("by", settings.by in BY, f"one of {', '.join(BY)}"),
        ("turns", settings.turns in TURNS, f"one of {', '.join(TURNS)}"),
        ("replay", min(settings.replay.values()) >= 1, "at least 1 of each"),
        ("engine", settings.engine in ("transformers", "vllm", "openai"), "transformers, vllm or openai"),
    ):
        if not allowed:
            raise ValueError(f"respond.{name} is {settings[name]}, must be {wanted}")
    if settings.states is not None:
        check_states(cfg)


def check_openai(cfg: DictConfig) -> None:
    """Check the settings of a served target.

    Raises:
        ValueError: a setting is missing or out of range; names the setting and the range.
    """
    how = cfg.respond.openai
    for name, allowed, wanted in (
        ("url", how.url, "the address of the server, such as http://127.0.0.1:8080/v1"),
        ("model", how.model, "the name under which the server has the target (its /v1/models lists it)"),
        ("concurrency", how.concurrency >= 1, "at least 1"),
        ("timeout", how.timeout > 0, "above 0 seconds"),
        ("retries", how.retries >= 0, "at least 0"),
        ("patience", how.patience >= 0, "at least 0 seconds"),
    ):
        if not allowed:
            raise ValueError(f"respond.openai.{name} is {how[name]}, must be {wanted}")
    if cfg.target.parallel:
        raise ValueError(f"target.parallel={cfg.target.parallel}, must be null with respond.engine=openai")


def check_states(cfg: DictConfig) -> None:
    """Check that the target of this run can keep its states, as far as the config tells.

    Raises:
        ValueError: it cannot; names the setting.
    """
    settings = cfg.respond
    if settings.states not in ARROW_TYPES:
        raise ValueError(f"respond.states is {settings.states}, must be null or one of {', '.join(ARROW_TYPES)}")
    for name, wanted in (("by", "target"), ("engine", "transformers")):
        if settings[name] != wanted:
            raise ValueError(
                f"respond.states={settings.states} needs respond.{name}={wanted}, which is {settings[name]}: only then "
                f"does this process have the target's hidden states. Give respond.states=null"
            )
    require_plain_head(meta_model(target_source(cfg)))
