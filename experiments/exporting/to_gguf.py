"""Run llama.cpp's converter for a vocabulary that it does not know.

The converter recognises a byte-level BPE vocabulary by a hash of how its tokenizer encodes one text, so it refuses
every vocabulary that is not on its list. The rule by which a tokenizer splits text is written in its tokenizer.json,
however. If that rule is GPT-2's, this script makes the converter treat the vocabulary as GPT-2's. The converter's own
Python runs it.
"""

import json
import runpy
import sys
from pathlib import Path


def splits_like_gpt2(folder: Path) -> bool:
    """Return whether a tokenizer.json splits text by GPT-2's rule into bytes, without normalising the text before."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = tokenizer.get("pre_tokenizer") or {}
    return (
        tokenizer.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space")
    )


def main(converter: Path, arguments: list[str]) -> None:
    """Run the converter, and answer "gpt-2" for an unknown vocabulary whose tokenizer splits text as GPT-2's does."""
    sys.path[0] = str(converter.parent)  # replaces this file's folder
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    from conversion.base import TextModel  # type: ignore[import-not-found]

    known = TextModel.get_vocab_base_pre

    def pre_tokenizer_name(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if splits_like_gpt2(Path(arguments[0])):
                return "gpt-2"
            raise

    TextModel.get_vocab_base_pre = pre_tokenizer_name
    sys.argv = [str(converter), *arguments]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
