"""Read the names that commands give drafters by, and load what they name.

A name is one of these:

- a directory with a model, or a hub name;
- `ngram`: prompt lookup; `ngram2-5` with n-grams of 2 to 5 tokens (see drafter.decoding.ngrams.Lookup);
- `ngram:<responses>`: a table of what the target wrote in a finished directory of responses, its training split;
- `layers4`: the target's first 4 layers with its own output embedding (see drafter.models.early_exit);
- `ngram+<other name>`: the first where it finds something, and otherwise the other one.
"""

import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig
from transformers import PreTrainedModel

from drafter.artifacts.manifest import ArtifactError, digest, fingerprint, read_manifest, require
from drafter.artifacts.rows import Rows
from drafter.data.batches import response_sequence
from drafter.decoding.drafting import Combined, Drafter
from drafter.decoding.ngrams import Answered, Lookup, NgramSizes, TextDrafter, check_sizes, count_ngrams
from drafter.decoding.stateful import keeps_states
from drafter.models.compatibility import drafter_source
from drafter.models.early_exit import first_layers
from drafter.models.fingerprints import model_fingerprint
from drafter.models.loading import load_config, meta_model
from drafter.models.source import ModelSource
from experiments.reporting.identity import DrafterIdentity, identity_of
from experiments.running.inputs import frozen_drafter, target_fingerprint, target_source

READ_AT_ONCE = 256  # rows of responses
FORMS = "ngram, ngram2-5 (n-grams of 2 to 5 tokens), ngram:<responses directory>, or one of these with +<other drafter>"


class NgramName(NamedTuple):
    """The name of a drafter without a model, and of the drafter that it is combined with.

    Attributes:
        sizes: n.
        responses: the directory of the responses that its table is made from; None for prompt lookup.
        otherwise: the name of the other drafter, if there is one.
    """

    sizes: NgramSizes
    responses: str | None
    otherwise: str | None

    def label(self) -> str:
        """Return what it is called in tables and directories, without the other drafter."""
        sizes = "" if self.sizes == NgramSizes() else f"{self.sizes.smallest}-{self.sizes.largest}"
        return f"ngram{sizes}" + (f"-{Path(self.responses).name}" if self.responses else "")


def parse(name: str) -> NgramName | None:
    """Return the parts of a drafter's name, or None if it is the name of a model.

    >>> parse("ngram2-5:runs/tiny/responses+runs/tiny/drafter")
    NgramName(sizes=NgramSizes(smallest=2, largest=5), responses='runs/tiny/responses', otherwise='runs/tiny/drafter')
    >>> parse("runs/tiny/drafter")

    Raises:
        ValueError: it begins like the name of a drafter without a model, but is none.
    """
    if not re.match(r"ngram($|[\d:+])", name):
        return None
    found = re.fullmatch(r"ngram(?:(\d+)-(\d+))?(?::([^+]+))?(?:\+(.+))?", name)
    if not found:
        raise ValueError(
            f"drafter '{name}': a drafter without a model is {FORMS}; a directory of this name is ./{name}"
        )
    smallest, largest, responses, otherwise = found.groups()
    try:
        sizes = check_sizes(NgramSizes(int(smallest), int(largest))) if smallest else NgramSizes()
    except ValueError as problem:
        raise ValueError(f"drafter '{name}': {problem}") from None
    if otherwise:
        parse(otherwise)
    return NgramName(sizes, responses, otherwise)


def model_of(name: str) -> str | None:
    """Return the part of a drafter's name that names a model, or None if there is none.

    >>> model_of("ngram+ngram:runs/tiny/responses+runs/tiny/drafter"), model_of("ngram"), model_of("org/name")
    ('runs/tiny/drafter', None, 'org/name')
    """
    parsed = parse(name)
    if parsed is None:
        return name
    return model_of(parsed.otherwise) if parsed.otherwise else None


def exit_layer(name: str) -> int | None:
    """Return how many of the target's first layers a model's name stands for, or None if it names another model.

    >>> exit_layer("layers4"), exit_layer("./layers4"), exit_layer("layers")
    (4, None, None)
    """
    found = re.fullmatch(r"layers(\d+)", name)
    return int(found[1]) if found else None


def model_source(cfg: DictConfig, name: str) -> ModelSource:
    """Return where the model of this name is, which is the target itself for some of its layers."""
    target = target_source(cfg)
    return drafter_source(name, target) if exit_layer(name) is None else target


def label_of(name: str) -> str:
    """Return the name of a drafter's directory of results: that of its own directory, or its parts.

    >>> label_of("ngram+runs/tiny/finetune/kld-seed1"), label_of("ngram2-3:runs/tiny/responses")
    ('ngram+kld-seed1', 'ngram2-3-responses')
    """
    parsed = parse(name)
    if parsed is None:
        return Path(name).name
    return parsed.label() + (f"+{label_of(parsed.otherwise)}" if parsed.otherwise else "")


def path_of(name: str) -> Path:
    """Return the directory by which a drafter is told apart from others of the same label.

    >>> path_of("ngram+runs/tiny/drafter").as_posix(), path_of("ngram:runs/tiny/responses").as_posix()
    ('runs/tiny/drafter', 'runs/tiny/responses')
    """
    parsed = parse(name)
    if parsed is None:
        return Path(name)
    return path_of(parsed.otherwise) if parsed.otherwise else Path(parsed.responses or name)


def fingerprint_of(name: str, target: str = "") -> str:
    """Return 16 hexadecimal digits that identify a drafter by its content.

    Args:
        name: the drafter's name.
        target: the target's fingerprint, which is part of that of its first layers.
    """
    parsed = parse(name)
    if parsed is None:
        count = exit_layer(name)
        return model_fingerprint(name) if count is None else digest({"target": target, "layers": count})
    responses = fingerprint(parsed.responses, "respond") if parsed.responses else None
    otherwise = fingerprint_of(parsed.otherwise, target) if parsed.otherwise else None
    return digest({"ngram": list(parsed.sizes), "responses": responses, "otherwise": otherwise})


def named_identity(name: str) -> DrafterIdentity:
    """Return the identity of a drafter. A combination has the seed and step of its model, and a series of its own."""
    parsed = parse(name)
    if parsed is None:
        return identity_of(name) if exit_layer(name) is None else DrafterIdentity(name)
    if not parsed.otherwise:
        return DrafterIdentity(parsed.label())
    other = named_identity(parsed.otherwise)
    return DrafterIdentity(f"{parsed.label()}+{other.series}", seed=other.seed, step=other.step)


def check_named(cfg: DictConfig, name: str) -> None:
    """Check that the responses in a drafter's name, if there are any, were written by the target, and its layers exist.

    Raises:
        ArtifactError: the responses are not finished, of another target, or not written by a target.
        ValueError: the target does not have these layers, or they cannot be a drafter.
    """
    parsed = parse(name)
    if parsed is None:
        return check_layers(cfg, name)
    if parsed.responses:
        try:
            manifest = read_manifest(parsed.responses, "respond")
        except ArtifactError as problem:
            raise ArtifactError(
                f"drafter '{name}': {problem}. A table is made from responses; a cache does not say who wrote its own"
            ) from None
        require(parsed.responses, "target", manifest["inputs"]["target"], target_fingerprint(cfg))
        if (by := manifest["settings"].get("by", "target")) != "target":
            raise ArtifactError(f"{parsed.responses} has answers by the {by}: give the target's, for a table of them")
    if parsed.otherwise:
        check_named(cfg, parsed.otherwise)


def check_layers(cfg: DictConfig, name: str) -> None:
    """Check that the target's first layers can be its drafter, if the name stands for them, without loading it.

    Raises:
        ValueError: the target has fewer layers, has states, cannot be made of some layers, or is split over ranks.
    """
    count, target = exit_layer(name), target_source(cfg)
    if count is None:
        return
    if keeps_states(load_config(target)):
        raise ValueError(f"drafter '{name}': {target.path} has states, so that its layers are no drafter: name a model")
    if target.parallel:
        raise ValueError(
            f"drafter '{name}': target.parallel is {target.parallel}, and layers are shared with a whole target: give "
            f"target.parallel=null"
        )
    try:
        first_layers(meta_model(target), count)
    except ValueError as problem:
        raise ValueError(f"drafter '{name}': {problem}") from None


def check_compiles(cfg: DictConfig, section: str) -> None:
    """Check that a command that is to compile both models, by its section of the config, has two of them.

    Raises:
        ValueError: the drafter's model shares its layers with the target.
    """
    chosen = cfg[section]
    if chosen.compile and exit_layer(model_of(chosen.drafter) or "") is not None:
        raise ValueError(
            f"{section}.compile is true, and {section}.drafter is {chosen.drafter}, whose layers are the target's: "
            f"give false"
        )


def load_named(
    cfg: DictConfig,
    name: str,
    target: PreTrainedModel,
    models: MutableMapping[str, PreTrainedModel] | None = None,
) -> Drafter:
    """Load a drafter, after checking that it is compatible with the target.

    Args:
        cfg: the command's config.
        name: the drafter's name.
        target: the target, whose first layers may be the drafter.
        models: the models that are loaded already, by name; a model that is loaded is added to them.
    """
    parsed, loaded = parse(name), {} if models is None else models
    if parsed is None:
        if name not in loaded:
            count = exit_layer(name)
            loaded[name] = frozen_drafter(cfg, name) if count is None else first_layers(target, count)
        return loaded[name]
    first: TextDrafter = Lookup(parsed.sizes)
    if parsed.responses:
        first = count_ngrams(answers(parsed.responses), parsed.sizes)
    return Combined(first, load_named(cfg, parsed.otherwise, target, loaded)) if parsed.otherwise else first


def answers(directory: str) -> Iterator[Answered]:
    """Read the target's answers to training instructions from a directory of responses."""
    rows = Rows(directory, "respond")
    training = np.flatnonzero(rows.splits == "train").tolist()
    for start in range(0, len(training), READ_AT_ONCE):
        for row in rows.read(training[start : start + READ_AT_ONCE]):
            sample = response_sequence(row)
            lengths = sample.turns or ()
            yield Answered(sample.ids_T, np.repeat(np.arange(len(lengths)) % 2 == 1, lengths))
