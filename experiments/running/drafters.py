"""Find the drafters that a command was given, and choose the directory of each evaluation."""

import glob
import json
import logging
from pathlib import Path
from typing import Any

from drafter.artifacts.manifest import MANIFEST, STARTED, ArtifactError
from experiments.reporting.identity import IDENTITY, STEPS
from experiments.running.named_drafters import exit_layer, fingerprint_of, label_of, model_of, path_of

log = logging.getLogger(__name__)


def find_drafters(patterns: list[str]) -> list[str]:
    """Return the finished model directories that match each pattern, in order.

    A pattern that does not look like a path, such as "org/name", is returned unchanged, as the name of a hub model. So
    is the name of a drafter without a model, or of the target's first layers; if it is combined with models, there is a
    name for each that matches.

    Raises:
        ArtifactError: a local pattern matches nothing.
        ValueError: it begins like the name of a drafter without a model, but is none.
    """
    found = []
    for name in patterns:
        pattern = model_of(name)
        if pattern is None:
            found.append(name)
            continue
        if pattern != name:
            found += [name.removesuffix(pattern) + path for path in find_drafters([pattern])]
            continue
        if exit_layer(pattern) is not None:
            found.append(name)
            continue
        paths, is_glob = match_paths(pattern)
        local = sorted(path for path in paths if (Path(path) / "config.json").exists())
        finished = [path for path in local if _is_finished(Path(path))] if is_glob else local
        if not finished and (is_glob or pattern.startswith((".", "/")) or pattern.count("/") != 1):
            raise ArtifactError(
                f"drafters: '{pattern}' matches no trained drafter; run the earlier stages first, or correct the path"
            )
        found += finished or [pattern]
    return found


def _is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).exists() or (directory / IDENTITY).exists() or directory.parent.name == STEPS


def match_paths(pattern: str) -> tuple[list[str], bool]:
    """Return the paths that match a pattern, and whether it is a glob.

    The longest leading part of the pattern that exists as it is written is taken literally, because a directory may
    have a name such as r[1].
    """
    parts = Path(pattern).parts
    literal = next((n for n in range(len(parts), 0, -1) if Path(*parts[:n]).exists()), 0)
    if literal == len(parts):
        return [pattern], False
    rest = "/".join(parts[literal:])
    return glob.glob(str(Path(glob.escape(str(Path(*parts[:literal]))), rest))), glob.has_magic(rest)


def output_directories(out: Path, paths: list[str]) -> dict[str, Path]:
    """Return the directory of each drafter's evaluation, which has the drafter's label: its own directory's name.

    Drafters with the same name get the name of a parent directory in front. A drafter that was evaluated under its
    plain name before keeps that name. Of several copies of one drafter, only the first is evaluated.

    Args:
        out: the directory in which all evaluations lie.
        paths: directories of drafters, or their names (see named_drafters).
    """
    by_name: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        by_name.setdefault(label_of(path), []).append(path)
    names = {same[0]: name for name, same in by_name.items() if len(same) == 1}
    for name, same in by_name.items():
        if len(same) > 1:
            names |= _distinct_names(same, _evaluated(out / name), {*by_name, *names.values()})
    return {path: out / names[path] for path in dict.fromkeys(paths) if path in names}


def _distinct_names(paths: list[str], evaluated: str | None, taken: set[str]) -> dict[str, str]:
    """Give drafters whose directories have the same name different names, none of which is taken.

    Args:
        paths: the drafters.
        evaluated: the fingerprint of the one that was evaluated under the plain name before.
        taken: the names of other evaluations.
    """
    first: dict[str, str] = {}
    for path in paths:
        fingerprint = fingerprint_of(path)
        if fingerprint in first:
            log.info("%s is a copy of %s, which is evaluated", path, first[fingerprint])
        first.setdefault(fingerprint, path)
    name, others = label_of(paths[0]), list(first.values())
    kept = {} if evaluated not in first else {first[evaluated]: name}
    if len(others) == 1:
        return {others[0]: name}
    places = {path: path_of(path) for path in others}
    above = {path: list((place.absolute() if place.exists() else place).parts[:-1]) for path, place in places.items()}
    depths = range(1, max(map(len, above.values())) + 1)
    one_parent = ([(above[path][-depth:] or [""])[0] for path in others] for depth in depths)
    all_parents = (["-".join(above[path][-depth:]) for path in others] for depth in depths)
    for prefixes in (*one_parent, *all_parents):
        found = {path: f"{prefix}-{name}".replace("/", "") for path, prefix in zip(others, prefixes, strict=True)}
        if len(set(found.values())) == len(others) and not taken & set(found.values()):
            return found | kept
    raise ArtifactError(f"drafters: {others} cannot be told apart by their directories: rename one of them")


def _evaluated(directory: Path) -> str | None:
    """Return the fingerprint of the drafter whose evaluation, finished or not, lies in a directory."""
    for path in (directory / MANIFEST, directory / STARTED):
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fingerprint: str | None = record["inputs"].get("drafter")
            return fingerprint
    return None
