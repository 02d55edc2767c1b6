"""Whether prompts and answers fit into both models, told from the configs alone, before anything computes."""

from omegaconf import DictConfig

from drafter.models.inspection import context_of_fields
from drafter.models.loading import context_limit
from experiments.running.inputs import plain, target_source


def check_lengths(cfg: DictConfig, prompt_tokens: int, answers: dict[str, int]) -> None:
    """Refuse answers for which the longest prompt may leave no room.

    Args:
        cfg: a stage's config, with the target and the drafter that is to be trained.
        prompt_tokens: of the longest prompt (prepare.max_prompt_tokens).
        answers: the setting that limits them -> its number of tokens.

    Raises:
        ValueError: names the setting, the model and what to change.
    """
    contexts = {
        f"the target {cfg.target.path}": context_limit(target_source(cfg)),
        "the drafter (drafter.max_position_embeddings)": context_of_fields(plain(cfg.drafter)),
    }
    for setting, tokens in answers.items():
        for model, context in contexts.items():
            if prompt_tokens + tokens > context:
                raise ValueError(
                    f"{setting} is {tokens}, and prompts have up to {prompt_tokens} tokens "
                    f"(prepare.max_prompt_tokens): together they exceed the context of {model}, {context} tokens. "
                    f"Lower one of the two"
                )
