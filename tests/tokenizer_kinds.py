"""Small tokenizers of the kinds that published models have, trained on this project's own documentation.

The kinds differ in what the beginning of a text, and the text after a control token, is encoded to. SentencePiece's
models mark the beginning of words by ▁: Llama 2's and Phi-3's files put one before every piece of text ("prepend"),
newer files only before the first ("first"), and Gemma's before none ("none").
"""

from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from drafter.models.source import TemplateSettings

KINDS = ("byte-level", "byte-level, split by words", "prepend", "first", "none", "unigram", "word pieces")
SIZE = 700
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _texts():
    return [Path(name).read_text() for name in ("README.md", "docs/DATA.md", "docs/GUIDE.md")]


@lru_cache
def _trained(kind):
    """Return the JSON of a trained tokenizer without control tokens."""
    if kind == "word pieces":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=["<unk>"], show_progress=False)
    elif kind.startswith("byte-level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind != "byte-level":
            words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        letters = [chr(number) for number in range(32, 127)] + ["\n", "▁", "｜"]
        trainer = trainers.UnigramTrainer(
            vocab_size=SIZE, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        spaces = normalizers.Replace(" ", "▁")
        undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        elif kind == "none":
            tokenizer.normalizer = spaces
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(undone if kind == "none" else [*undone, decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=SIZE + 256, special_tokens=["<unk>", *BYTES], show_progress=False)
    texts = _texts()
    if kind in ("prepend", "first", "none"):  # no piece spans two words
        texts = [word if kind == "prepend" else f" {word}" for text in texts for word in text.split(" ")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tokenizer_of_kind(kind, template, bos, eos, control=(), ordinary=(), rstrip=(), settings=None):
    """Return a tokenizer that puts `bos`, if any, before every text that it encodes by itself.

    Args:
        kind: one of KINDS.
        template: the chat template.
        bos: the token at the beginning of a text, or None.
        eos: the token at the end.
        control: the other control tokens.
        ordinary: added tokens that are no control tokens, such as <think>.
        rstrip: those control tokens that strip the white space behind them.
        settings: TemplateSettings.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    special = list(dict.fromkeys(token for token in (bos, eos, *control) if token))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in rstrip) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    fast.template_settings = settings or TemplateSettings()
    return fast
