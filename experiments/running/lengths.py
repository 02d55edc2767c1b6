"""Say what a model's context costs: from the configs before anything computes, and from the responses in training."""

import logging

from omegaconf import DictConfig

from drafter.models.loading import context_length, context_limit, meta_model
from drafter.training.samples import Beyond
from experiments.running.inputs import target_source
from experiments.running.starts import empty_drafter

log = logging.getLogger(__name__)
SERVING = (
    "When it is served, tokens beyond its context are generated without useful drafts: see 'Long answers' in "
    "docs/DATA.md"
)


def check_lengths(cfg: DictConfig, prompt_tokens: int, limits: dict[str, int], training: bool = False) -> None:
    """Refuse response lengths that together with the longest prompt exceed the context of a model.

    Args:
        cfg: the config of a stage, which has the target and the drafter to be trained.
        prompt_tokens: the length of the longest prompt (prepare.max_prompt_tokens).
        limits: the name of each setting that limits responses, with its number of tokens.
        training: the responses are for training, which cuts them at the drafter's context. That is only a warning.

    Raises:
        ValueError: a response may not fit; names the setting, the model and what to change.
    """
    target, drafter = context_limit(target_source(cfg)), context_of_drafter(cfg)
    name = "the drafter (drafter.max_position_embeddings)" if cfg.init.kind == "scratch" else "the drafter"
    contexts = {f"the target {cfg.target.path}": target, name: drafter}
    for setting, tokens in limits.items():
        for model, context in contexts.items():
            if prompt_tokens + tokens <= context:
                continue
            problem = (
                f"{setting} is {tokens}, and prompts have up to {prompt_tokens} tokens (prepare.max_prompt_tokens): "
                f"together they exceed the context of {model}, {context} tokens"
            )
            if not training or context == target:
                raise ValueError(f"{problem}. Lower one of the two")
            log.warning("%s. Finetuning cuts the responses there, and says how many. %s", problem, SERVING)


def context_of_drafter(cfg: DictConfig) -> int:
    """Return the context of the drafter that `cfg.init` starts from, in tokens."""
    return context_length(empty_drafter(cfg, meta_model(target_source(cfg))))


def warn_of_context(cfg: DictConfig, context: int, of_target: int, *beyond: Beyond) -> None:
    """Warn if the drafter's context is shorter than the target's or than what it is trained on, and say what it costs.

    Args:
        cfg: the config of a finetuning.
        context: the drafter's context, in tokens.
        of_target: the target's context.
        beyond: what of the training and of the validation responses lies beyond the drafter's context.
    """
    text = cfg.finetune.sequence_length > context
    if context >= of_target and not text and not any(one.share for one in beyond):
        return
    log.warning(
        "the drafter's context is %d tokens, the target's %d. In training, %s; in validation, %s.%s %s",
        context,
        of_target,
        *beyond,
        f" Text is cut to {context} tokens (finetune.sequence_length={cfg.finetune.sequence_length})." if text else "",
        SERVING,
    )
