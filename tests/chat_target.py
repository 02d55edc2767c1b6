"""A chat model with random weights, whose tokenizer has a chat template with control tokens."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

NOUNS = "the a cat dog bird tree house man child fox cow river stone book door song".split()  # noqa: SIM905
VERBS = "saw ran found likes who what did why and then to . ? !".split()  # noqa: SIM905
CONTROLS = ["<|user|>", "<|reply|>", "<|stop|>"]
VOCABULARY = ["<end>", "<unk>", *NOUNS, *VERBS, *CONTROLS]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
    "<|user|> {{ m['content'] }} <|stop|> {% else %}<|reply|> {{ m['content'] }} <|stop|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|reply|> {% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": CONTROLS})
    made.chat_template = template
    return made


def chat_model(seed=0, positions=128):
    """Return a GPT-2 that ends a message after some words, and rarely writes other control tokens or padding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY) + 1, n_positions=positions, n_embd=32, n_layer=2, n_head=2,
        eos_token_id=0, bos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.lm_head.weight.data.mul_(15)
    model.transformer.ln_f.bias.data[0] = 4.0  # a feature that has this value at every position
    model.lm_head.weight.data[:, 0] = 0.0
    for word, weight in (("<unk>", -5), ("<|user|>", -0.7), ("<|reply|>", -5), ("<|stop|>", 0.3)):
        model.lm_head.weight.data[VOCABULARY.index(word), 0] = weight
    model.lm_head.weight.data[-1, 0] = -5
    return model.requires_grad_(False).eval()


def save_chat_target(folder, seed=0):
    chat_tokenizer().save_pretrained(folder)
    chat_model(seed).save_pretrained(folder)
    return folder
