"""Rows of a dataset from a local file or the hub, and the text that a template makes of a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def read_rows(
    path: str, split: str = "train", name: str | None = None, revision: str | None = None
) -> Iterator[dict[str, Any]]:
    """Stream the rows of a local .jsonl, .json, .parquet, .csv or .txt file, or of a split of a hub dataset.

    Raises:
        FileNotFoundError: a path that looks like a file is not there.
        ValueError: the file is of another kind.
    """
    import datasets  # takes four seconds: paid only by those who read one

    file = Path(path).expanduser()
    if file.suffix in BUILDERS or file.exists():
        if not file.exists():
            raise FileNotFoundError(f"no data file at '{path}'")
        if file.suffix not in BUILDERS:
            raise ValueError(f"'{path}' is none of {', '.join(BUILDERS)}")
        rows = datasets.load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", streaming=True)
    else:
        rows = datasets.load_dataset(path, name, split=split, revision=revision, streaming=True)
    return iter(rows)


def render(template: str, row: dict[str, Any]) -> str:
    r"""Fill a template such as "Summarise:\n\n{article}" or "{translation[de]}" from a row.

    Raises:
        KeyError: the row lacks a field of the template.
    """
    try:
        return template.format_map(row).strip()
    except KeyError as missing:
        raise KeyError(f"template {template!r} needs the field {missing}; the row has {sorted(row)}") from None


def matches(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether every field of `where` has the given value in the row."""
    return all(row.get(field) == value for field, value in where.items())
