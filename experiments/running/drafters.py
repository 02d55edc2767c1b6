"""Which drafters a command was asked for, where the evaluation of each lies, and what the tables call it."""

import glob
import json
import logging
from pathlib import Path
from typing import Any

from drafter.artifacts.manifest import MANIFEST, STARTED, ArtifactError
from drafter.models.fingerprints import model_fingerprint
from experiments.running.inputs import STEPS

log = logging.getLogger(__name__)


def find_drafters(patterns: list[str]) -> list[str]:
    """Finished model directories of each pattern, in order; a pattern that is no path is a hub name.

    Raises:
        ArtifactError: a local pattern matches nothing.
    """
    found = []
    for pattern in patterns:
        paths, several = matching(pattern)
        local = sorted(path for path in paths if (Path(path) / "config.json").exists())
        whole = (path for path in local if (Path(path) / MANIFEST).exists() or Path(path).parent.name == STEPS)
        finished = list(whole) if several else local
        if not finished and (several or pattern.startswith((".", "/")) or pattern.count("/") != 1):
            raise ArtifactError(
                f"drafters: '{pattern}' matches no trained drafter; run the stages before, or correct it"
            )
        found += finished or [pattern]
    return found


def matching(pattern: str) -> tuple[list[str], bool]:
    """The paths that a pattern matches, and whether it may match several.

    As much of it as exists the way it is written is no pattern: a directory may be called r[1].
    """
    parts = Path(pattern).parts
    literal = next((n for n in range(len(parts), 0, -1) if Path(*parts[:n]).exists()), 0)
    if literal == len(parts):
        return [pattern], False
    rest = "/".join(parts[literal:])
    return glob.glob(str(Path(glob.escape(str(Path(*parts[:literal]))), rest))), glob.has_magic(rest)


def output_directories(out: Path, paths: list[str]) -> dict[str, Path]:
    """Drafter -> the directory of its evaluation, named like the drafter's own.

    Drafters of one name are told apart by a directory above them, but one that has been evaluated under its own name
    keeps it. Of several copies of one drafter the first is evaluated.
    """
    alike: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        alike.setdefault(Path(path).name, []).append(path)
    names = {one[0]: name for name, one in alike.items() if len(one) == 1}
    for name, several in alike.items():
        if len(several) > 1:
            names |= _told_apart(several, _evaluated(out / name), {*alike, *names.values()})
    return {path: out / names[path] for path in dict.fromkeys(paths) if path in names}


def _told_apart(paths: list[str], evaluated: str | None, taken: set[str]) -> dict[str, str]:
    """Drafters of one name -> names that differ, and that are not taken."""
    first: dict[str, str] = {}
    for path in paths:
        fingerprint = model_fingerprint(path)
        if fingerprint in first:
            log.info("%s is a copy of %s, which is evaluated", path, first[fingerprint])
        first.setdefault(fingerprint, path)
    name, others = Path(paths[0]).name, list(first.values())
    kept = {} if evaluated not in first else {first[evaluated]: name}
    if len(others) == 1:
        return {others[0]: name}
    above = {path: list((Path(path).absolute() if Path(path).exists() else Path(path)).parts[:-1]) for path in others}
    depth = range(1, max(map(len, above.values())) + 1)
    by_one = ([(above[path][-d:] or [""])[0] for path in others] for d in depth)
    by_all = (["-".join(above[path][-d:]) for path in others] for d in depth)
    for prefixes in (*by_one, *by_all):
        found = {path: f"{prefix}-{name}".replace("/", "") for path, prefix in zip(others, prefixes, strict=True)}
        if len(set(found.values())) == len(others) and not taken & set(found.values()):
            return found | kept
    raise ArtifactError(f"drafters: {others} cannot be told apart by their directories: rename one")


def _evaluated(directory: Path) -> str | None:
    """The fingerprint of the drafter whose evaluation lies there, finished or not."""
    for record in (directory / MANIFEST, directory / STARTED):
        if record.exists():
            found: str | None = json.loads(record.read_text(encoding="utf-8"))["inputs"].get("drafter")
            return found
    return None


def identity_of(path: str) -> dict[str, Any]:
    """What the tables call a drafter: the loss and seed of its finetuning, and the step it was kept at."""
    manifest, step = Path(path) / MANIFEST, None
    if Path(path).parent.name == STEPS:
        manifest, step = Path(path).parent.parent / MANIFEST, int(Path(path).name.rsplit("-step", 1)[1])
    if not manifest.exists():
        return {"loss": Path(path).name, "seed": 0, "step": None}
    settings = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    name = settings.get("name", "pretrained").rsplit("-seed", 1)[0]
    return {"loss": name, "seed": settings["seed"], "step": step}
