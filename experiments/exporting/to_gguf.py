"""llama.cpp's own converter, for vocabularies that it has not met.

The converter knows a byte-level BPE vocabulary by a hash of what its tokenizer makes of one text, which no vocabulary
of one's own can match. How such a tokenizer splits text is written in its tokenizer.json, though, and where that is
GPT-2's way, llama.cpp can be told. Run as a script, by the converter's Python, this is the converter with that answer.
"""

import json
import runpy
import sys
from pathlib import Path


def splits_like_gpt2(folder: Path) -> bool:
    """Whether a tokenizer.json splits text by GPT-2's rule and then into bytes, and changes nothing before."""
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
    """Run the converter; a vocabulary that it does not know, but splits like GPT-2's, is told to be like it."""
    sys.path[0] = str(converter.parent)  # in the place of this file's folder
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    from conversion.base import TextModel  # type: ignore[import-not-found]

    known = TextModel.get_vocab_base_pre

    def of(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if splits_like_gpt2(Path(arguments[0])):
                return "gpt-2"
            raise

    TextModel.get_vocab_base_pre = of
    sys.argv = [str(converter), *arguments]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
