"""Identify the drafter that a number belongs to, by fields that manifests carry and never by a directory's name."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drafter.artifacts.manifest import MANIFEST, earlier_version

IDENTITY = "identity.json"  # lies in the directory of a drafter that was kept during its finetuning
STEPS = "steps"  # the folder of a finetuning that has its drafter at some of its steps
PRETRAINED = "pretrained"


class DrafterIdentity(NamedTuple):
    """The identity of a drafter in tables. Settings are given by their config names; None means "does not apply".

    Attributes:
        series: the name in tables and figures; the seeds of one series are summed.
        loss: the config chosen of conf/loss.
        variant: the config chosen of conf/variant, or the label that was given in its place.
        weighting: the config chosen of conf/weighting.
        kinds: the kinds of instructions whose responses were trained on; None means all of them.
        swept: the other keys that a sweep varied, with this drafter's values.
        seed: the seed of the training.
        step: the finetuning step at which the drafter was kept; None means the end.
    """

    series: str
    loss: str | None = None
    variant: str | None = None
    weighting: str | None = None
    kinds: list[str] | None = None
    swept: dict[str, Any] | None = None
    seed: int | None = None
    step: int | None = None


def read_fields(fields: dict[str, Any], directory: str | Path) -> DrafterIdentity:
    """Return the identity among the fields of a record, which may have others beside it.

    Raises:
        ArtifactError: a field is missing, as in the records of earlier versions.
    """
    if missing := [name for name in DrafterIdentity._fields if name not in fields]:
        raise earlier_version(directory, f"its record lacks {', '.join(missing)}")
    return DrafterIdentity(**{name: fields[name] for name in DrafterIdentity._fields})


def read_record(record: dict[str, Any], directory: str | Path) -> DrafterIdentity:
    """Return the identity in the manifest, or the started.json, of a stage that makes a drafter."""
    if record.get("stage") == "pretrain":
        return DrafterIdentity(PRETRAINED, seed=record["settings"]["seed"])
    return read_fields(record["settings"], directory)


def read_record_of_run(path: Path) -> dict[str, Any]:
    """Return a manifest as runs.json has it: without the list of files and the config."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in manifest.items() if key not in ("files", "config")}


def identity_of(path: str) -> DrafterIdentity:
    """Return the identity of a drafter: a directory or a hub name.

    A drafter that no stage of this project made has the name of its directory, no seed and no step.

    Raises:
        ArtifactError: an earlier version of this project made the drafter.
    """
    folder = Path(path)
    if (folder / IDENTITY).exists():
        return read_fields(json.loads((folder / IDENTITY).read_text(encoding="utf-8")), path)
    if (folder.parent.parent / MANIFEST).exists() and folder.parent.name == STEPS:
        raise earlier_version(path, f"it has no {IDENTITY}")
    if (folder / MANIFEST).exists():
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if record.get("stage") in ("pretrain", "finetune", "trim", "average"):
            return read_record(record, path)
    return DrafterIdentity(folder.name)


def with_distinct_series(found: Sequence[DrafterIdentity], directories: Sequence[Path]) -> list[DrafterIdentity]:
    """Append the directory's name to a series wherever different drafters would be summed as if they were its seeds.

    This concerns drafters that share series, seed and step, and drafters from elsewhere whose name is also that of a
    series that was trained here.

    Args:
        found: the drafters.
        directories: the directory of each one's results.
    """
    times = Counter((one.series, one.seed, one.step or 0) for one in found)
    trained = {one.series for one in found if one.loss}
    return [
        one._replace(series=f"{one.series} ({directory.name})")
        if times[one.series, one.seed, one.step or 0] > 1 or (one.loss is None and one.series in trained)
        else one
        for one, directory in zip(found, directories, strict=True)
    ]
