"""Pack text into tokens, and read the text of the default setting: docstrings of the installed Python packages.

Docstrings are real English that every machine which can run this project has, so the complete method can be tried
without a download. They are read with `ast`, in parallel; no package is imported or executed.
"""

import ast
import copy
import hashlib
import importlib.machinery
import importlib.util
import inspect
import signal
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drafter.artifacts.storage import whole_file
from drafter.data.prompts import encode_text
from drafter.progress import Report, silent

SKIPPED_FOLDERS = {"tests", "test", "site-packages", "idlelib", "lib2to3", "__pycache__", "_vendor", "testing"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MIN_CHARACTERS, MAX_CHARACTERS = 40, 2500


class Doc(NamedTuple):
    """A documented object: qualified name, call signature ("" for modules), docstring, and source code."""

    name: str
    signature: str
    text: str
    code: str


def source_files(packages: list[str]) -> list[tuple[str, Path]]:
    """Return (module name, path) of every Python file of the packages; "stdlib" means the standard library.

    Raises:
        ValueError: a package is not installed.
    """
    files = []
    for package in packages:
        if package == "stdlib":
            root, prefix = Path(sysconfig.get_paths()["stdlib"]), ""
        else:
            spec = _find(package)
            if spec is None or not spec.submodule_search_locations:
                raise ValueError(f"data.packages: '{package}' is not an installed package: install it or remove it")
            root, prefix = Path(spec.submodule_search_locations[0]), package + "."
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not SKIPPED_FOLDERS & set(parts):
                module = ".".join(part for part in parts if part != "__init__")
                files.append(((prefix + module).rstrip("."), path))
    return files


def _find(package: str) -> importlib.machinery.ModuleSpec | None:
    """Find a package along sys.path, which imports nothing. The finders of other packages may: they are asked last.

    setuptools installs a finder that unloads distutils, with a warning, when it is asked for pip.
    """
    path: list[str] | None = None
    name = ""
    for part in package.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        path = None if spec is None else spec.submodule_search_locations
        if spec is None or path is None:
            with suppress(ModuleNotFoundError):  # raised where the part before the last dot is not installed
                return importlib.util.find_spec(package)
            return None
    return spec


def extract(packages: list[str], workers: int, report: Report = silent) -> list[Doc]:
    """Return the docstrings of the packages in a fixed order. Identical texts are kept once, under the first name.

    Raises:
        ValueError: a package is not installed, or the packages have no docstring.
    """
    files = source_files(packages)
    # Ctrl-C reaches all processes of the group: the workers ignore it, and the pool ends them in order.
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        found = pool.map(_docs_of_file, files, chunksize=32)
        docs = []
        for number, docs_of_file in enumerate(found, start=1):
            docs += docs_of_file
            report(number, len(files), 0)
    unique = {" ".join(doc.text.split()): doc for doc in reversed(docs)}
    if not unique:
        raise ValueError(f"the corpus is empty: no docstrings in packages {packages}")
    return sorted(unique.values())


def is_heldout(name: str, percent: float) -> bool:
    """Return whether a name belongs to the held-out split. A fixed hash decides, whatever other names there are."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10_000 < percent * 100


def pretraining_texts(docs: list[Doc], code_share: float) -> Iterator[str]:
    """Yield each docstring under its signature, and the source code of `code_share` of the functions that have any."""
    for doc in docs:
        yield f"`{doc.name}{doc.signature}`\n\n{doc.text}"
        if doc.code and is_heldout("code:" + doc.name, 100 * code_share):
            yield doc.code


def pack(
    path: Path,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    end: int | None,
    limit: int | None = None,
    report: Report = silent,
) -> int:
    """Tokenize texts and write them to a .npy file of uint16 or uint32, each followed by the token `end`.

    Texts are processed a thousand at a time, so that their number is not limited by memory.

    Args:
        path: the file to write.
        texts: the texts in order.
        tokenizer: encodes the texts.
        end: the id that separates texts, or None for no separator.
        limit: the largest number of tokens to write.
        report: called after each thousand texts.

    Returns:
        The number of tokens written.

    Raises:
        ControlTokenError: a text spells out a control token that the tokenizer cannot encode as text.
    """
    largest = max(*tokenizer.get_vocab().values(), end or 0)  # ids may have gaps and exceed the number of tokens
    dtype = np.uint16 if largest < 2**16 else np.uint32
    count, remaining = 0, iter(texts)
    with whole_file(path) as file:
        _write_header(file, dtype, 0)
        while (limit is None or count < limit) and (batch := list(islice(remaining, 1000))):
            tokens = _encode(batch, tokenizer, end, dtype)[: None if limit is None else limit - count]
            file.write(tokens.tobytes())
            count += len(tokens)
            report(count, limit, len(tokens))
        file.seek(0)
        _write_header(file, dtype, count)
    return count


def _write_header(file: BinaryIO, dtype: type, count: int) -> None:
    """Write a .npy header. Its size is the same for any count, because numpy pads it so that the count can grow."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int | None, dtype: type) -> np.ndarray:
    ends = [] if end is None else [end]
    return np.concatenate([np.array([*ids, *ends], dtype) for ids in encode_text(tokenizer, texts)])


def _docs_of_file(module_and_path: tuple[str, Path]) -> list[Doc]:
    module, path = module_and_path
    source = path.read_text(encoding="utf-8", errors="ignore")
    if len(source) > 2_000_000:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return list(_docs_of_node(module, tree))


def _docs_of_node(name: str, node: Documented) -> Iterator[Doc]:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    if name and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and len(text.encode()) < 1.03 * len(text):
        signature = code = ""
        if isinstance(node, Function):
            signature, code = f"({ast.unparse(_without_annotations(node.args))})", _code(node)
        yield Doc(name, signature if len(signature) < 120 else "(...)", text, code)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, Function)) and (not child.name.startswith("_") or child.name == "__init__"):
            yield from _docs_of_node(f"{name}.{child.name}", child)


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    all_arguments = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in filter(None, all_arguments):
        argument.annotation = None
    return arguments


def _code(node: Function) -> str:
    """Return the function without its docstring, normalised by `ast`; "" if it is too short or too long."""
    body = node.body[1:]
    if not 3 <= len(body) <= 12:
        return ""
    bare = copy.copy(node)
    bare.body, bare.decorator_list, bare.returns = body, [], None
    code = ast.unparse(bare)
    return code if 150 <= len(code) <= 1200 else ""
