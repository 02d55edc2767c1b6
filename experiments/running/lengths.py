"""Check from the configs alone that prompts and responses fit into the context of both models."""

from omegaconf import DictConfig

from drafter.models.inspection import context_of_fields
from drafter.models.loading import context_limit
from experiments.running.inputs import plain, target_source


def check_lengths(cfg: DictConfig, prompt_tokens: int, limits: dict[str, int]) -> None:
    """Refuse response lengths that together with the longest prompt exceed the context of a model.

    Args:
        cfg: the config of a stage, which has the target and the drafter to be trained.
        prompt_tokens: the length of the longest prompt (prepare.max_prompt_tokens).
        limits: the name of each setting that limits responses, with its number of tokens.

    Raises:
        ValueError: a response may not fit; names the setting, the model and what to change.
    """
    contexts = {
        f"the target {cfg.target.path}": context_limit(target_source(cfg)),
        "the drafter (drafter.max_position_embeddings)": context_of_fields(plain(cfg.drafter)),
    }
    for setting, tokens in limits.items():
        for model, context in contexts.items():
            if prompt_tokens + tokens > context:
                raise ValueError(
                    f"{setting} is {tokens}, and prompts have up to {prompt_tokens} tokens "
                    f"(prepare.max_prompt_tokens): together they exceed the context of {model}, {context} tokens. "
                    f"Lower one of the two"
                )
