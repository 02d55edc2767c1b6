"""Give a drafter attention heads that copy: it then continues a repeated phrase before it has been trained.

What a chat model writes repeats its prompt and itself, above all in summaries. Trained models recognise a repetition
with heads in two successive layers ("induction heads", Olsson et al., arXiv 2209.11895). A drafter of a few million
parameters does not learn them from a few million tokens, so their weights are computed here:

- In the first layer, head 0 attends to the previous token and head 1 to the token before it. Each writes a code of its
  token, which is a projection of the token's embedding, to dimensions of the hidden state that are reserved for it.
- In the second layer, head 0 attends to positions before which the same two tokens stand as here. It writes the
  embedding of the token at such a position, which is the token that followed there.

The dimensions of the hidden state are those of the token's embedding, a constant, and two codes. Training changes the
lengths of embeddings, and with them all that is normalised together with them. So queries and keys have to be
normalised in each head, as in Qwen3: what looks back then depends on the sign of the constant alone, and codes are
compared by the cosine of the angle between them.

Shapes: V vocabulary, T tokens, H hidden size, K dimensions of the embedding, R of a code, D of a head.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from drafter.models.initialization import principal_directions
from drafter.models.inspection import body

SCALE = 0.3  # of the embeddings: large enough that the first training steps do not cover what the hidden state carries
CONSTANT = 2.0  # the constant, in units of the scale
OUTPUT_GAIN = 0.3  # of the last normalisation
FAST_PAIRS = 6  # pairs of a head's dimensions that the rotary embedding turns fastest, which tell neighbours apart
PREVIOUS = 17.0  # by how much the logit of attention to the previous token exceeds that to its neighbours
MATCH = 32.0  # the logit of attention to a position whose two codes are those wanted; it is half of it for one code
COPY = 4.0  # the length of what is copied, in units of the embedding's
REACH, TURN = 1024, 0.7  # codes are compared in dimensions that turn by at most so many radians over so many tokens
NORMALISED = ("qwen3",)  # architectures like Llama's that normalise the queries and keys of each head
MARK = "copying_heads"  # the field of a config that says that a drafter has them
SEED = 0  # of the projection to codes
CHECKED = 64  # tokens of the check


class _Layout(NamedTuple):
    """Where the parts of the hidden state lie: the embedding first, then the constant and the two codes."""

    embedding: int
    code: int

    @property
    def constant(self) -> float:
        """The constant's value in the normalised embedding of a token."""
        return CONSTANT / math.sqrt((self.embedding + CONSTANT**2) / (self.embedding + 1 + 2 * self.code))

    @property
    def codes(self) -> list[slice]:
        """The dimensions of the codes of the previous token and of the one before it."""
        start = self.embedding + 1
        return [slice(start, start + self.code), slice(start + self.code, start + 2 * self.code)]


@torch.no_grad()
def add_copying_heads(drafter: PreTrainedModel, target_VH: torch.Tensor, counts_V: torch.Tensor) -> PreTrainedModel:
    """Give a drafter the target's embeddings, projected, and heads that copy, in place, and return it.

    Args:
        drafter: a drafter of Qwen3's architecture with random weights and as many rows as the target.
        target_VH: the target's output embedding.
        counts_V: how often each token occurs in text. The codes tell frequent tokens apart best.

    Raises:
        ValueError: the drafter's architecture or sizes do not allow it; says why.
    """
    layout = check_can_copy(drafter)
    model: Any = body(drafter)
    rows_VH = _embeddings(drafter.config.get_text_config().hidden_size, layout.embedding, target_VH)
    model.embed_tokens.weight.copy_(rows_VH)
    model.norm.weight.fill_(OUTPUT_GAIN)
    for layer in model.layers:  # what has random weights adds nothing at first
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    code_RK, mean_R = _codes(rows_VH, layout, counts_V)
    frequencies = model.rotary_emb.inv_freq.float()
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    for number, places in enumerate(layout.codes):
        _look_back(first, number, layout, frequencies, code_RK, mean_R)
        first.o_proj.weight[places, _rows(first, number)][:, : layout.code] = torch.eye(layout.code) * SCALE
    _match(second, layout, code_RK, mean_R)
    setattr(drafter.config, MARK, True)
    _check_copies(drafter, counts_V)
    return drafter


def copying_weights(drafter: PreTrainedModel) -> Iterator[tuple[nn.Parameter, tuple[slice, ...]]]:
    """Yield the weights that were computed so that heads copy, each with its part; none for other drafters.

    What is copied, by the values of the second layer, is left out: training refines it. The constant of the embeddings
    adds the same to the logits of all tokens, so that holding it takes nothing from training.
    """
    if not getattr(drafter.config, MARK, False):
        return
    model: Any = body(drafter)
    layers, constant = model.layers[:2], check_can_copy(drafter).embedding
    first, second = (layer.self_attn for layer in layers)
    both, one, every = slice(2 * first.head_dim), slice(second.head_dim), slice(None)
    yield model.embed_tokens.weight, (every, slice(constant, constant + 1))
    for projection in (first.q_proj, first.k_proj, first.v_proj):
        yield projection.weight, (both, every)
    yield first.o_proj.weight, (every, both)
    for projection in (second.q_proj, second.k_proj):
        yield projection.weight, (one, every)
    for layer in layers:
        for norm in (layer.input_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm):
            yield norm.weight, (every,)


def check_can_copy(drafter: PreTrainedModel) -> _Layout:
    """Return how the hidden state is divided, or raise if the drafter cannot copy. It may be on the meta device.

    Raises:
        ValueError: names what is missing.
    """
    config = drafter.config.get_text_config()
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    wanted = {
        "normalise queries and keys, as Qwen3 does": config.model_type in NORMALISED,
        "have tied embeddings": config.tie_word_embeddings,
        "have two layers or more": config.num_hidden_layers >= 2,
        "have two heads or more, each with keys of its own": heads >= 2 and groups in (None, heads),
    }
    for what, holds in wanted.items():
        if not holds:
            raise ValueError(f"init=copying: the drafter must {what}; give init=projected, or change conf/drafter")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    base = config.rope_parameters["rope_theta"]
    slow = sum(base ** (-pair / (size // 2)) * REACH <= TURN for pair in range(size // 2))
    code = min(slow, (config.hidden_size - 1) // 4)
    if code < 8:
        raise ValueError(
            f"init=copying: codes have {code} dimensions, and need 8 to tell tokens apart: give the drafter a larger "
            f"hidden_size (it is {config.hidden_size}), head_dim ({size}) or rope_theta ({base:g})"
        )
    return _Layout(config.hidden_size - 1 - 2 * code, code)


def _embeddings(hidden_size: int, width: int, target_VH: torch.Tensor) -> torch.Tensor:
    """Return rows of shape (V, H): the target's, projected and equally long, then the constant, then zeros."""
    centred_VH = target_VH.float() - target_VH.float().mean(0)
    rows_VK = centred_VH @ principal_directions(centred_VH, width)
    rows_VH = rows_VK.new_zeros(len(rows_VK), hidden_size)
    rows_VH[:, :width] = SCALE * rows_VK / rows_VK.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    rows_VH[:, width] = SCALE * CONSTANT
    return rows_VH


def _codes(rows_VH: torch.Tensor, layout: _Layout, counts_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a projection of normalised embeddings to codes, (R, K), and what it makes of the mean token, (R,).

    In text with these counts, the coordinates of the codes are uncorrelated and have variance 1.
    """
    rows_VK = (rows_VH / rows_VH.square().mean(-1, keepdim=True).sqrt())[:, : layout.embedding]
    shares_V1 = (counts_V + 1.0)[:, None] / (counts_V + 1.0).sum()
    mean_K = (shares_V1 * rows_VK).sum(0)
    covariance_KK = (rows_VK - mean_K).T @ ((rows_VK - mean_K) * shares_V1)
    variances_K, axes_KK = torch.linalg.eigh(covariance_KK + 1e-4 * torch.eye(layout.embedding))
    whitening_KK = axes_KK @ torch.diag(variances_K.rsqrt()) @ axes_KK.T
    random_KR = torch.randn(layout.embedding, layout.code, generator=torch.Generator().manual_seed(SEED))
    code_RK = torch.linalg.qr(random_KR).Q.T @ whitening_KK
    return code_RK, code_RK @ mean_K


def _rows(attention: Any, head: int) -> slice:
    """Return the rows of a head in the matrices of queries, keys and values."""
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _look_back(
    attention: Any,
    head: int,
    layout: _Layout,
    frequencies: torch.Tensor,
    code_RK: torch.Tensor,
    mean_R: torch.Tensor,
) -> None:
    """Let a head attend `head` + 1 tokens back, and take the code of the token there.

    Queries and keys are constant but for the rotary embedding. The key is turned in advance by the distance, so that
    it points in the query's direction at that distance alone.
    """
    rows, half = _rows(attention, head), attention.head_dim // 2
    fast = frequencies[:FAST_PAIRS]
    query, key = torch.zeros(attention.head_dim), torch.zeros(attention.head_dim)
    query[: len(fast)] = 1
    key[: len(fast)] = (fast * (head + 1)).cos()
    key[half : half + len(fast)] = (fast * (head + 1)).sin()
    for projection, vector in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[rows] = 0
        projection.weight[rows, layout.embedding] = vector
    contrast = float((1 - fast.cos()).mean())
    _sharpen(attention, PREVIOUS / contrast, torch.cat([torch.arange(len(fast)), half + torch.arange(len(fast))]))
    attention.v_proj.weight[rows] = 0
    values = attention.v_proj.weight[rows][: layout.code]
    values[:, : layout.embedding] = code_RK
    values[:, layout.embedding] = -mean_R / layout.constant


def _match(attention: Any, layout: _Layout, code_RK: torch.Tensor, mean_R: torch.Tensor) -> None:
    """Let head 0 attend to where the present two tokens stood before, one position on, and take the embedding there.

    Both codes are compared in the dimensions that the rotary embedding turns least: the first elements of the pairs
    have the code of the later token, the second elements that of the earlier one.
    """
    size, code, width = attention.head_dim, layout.code, layout.embedding
    copied, (previous, earlier) = min(size, width), layout.codes
    later_dims, earlier_dims = torch.arange(size // 2 - code, size // 2), torch.arange(size - code, size)
    one = torch.eye(code)
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight[:size] = 0
    attention.q_proj.weight[later_dims, :width] = code_RK
    attention.q_proj.weight[later_dims, width] = -mean_R / layout.constant
    attention.q_proj.weight[earlier_dims, previous] = one
    attention.k_proj.weight[later_dims, previous] = one
    attention.k_proj.weight[earlier_dims, earlier] = one
    _sharpen(attention, MATCH, torch.cat([later_dims, earlier_dims]))
    attention.v_proj.weight[:copied, :copied] = torch.eye(copied)
    attention.o_proj.weight[:copied, :copied] = torch.eye(copied) * SCALE * COPY


def _sharpen(attention: Any, logit: float, dimensions: torch.Tensor) -> None:
    """Let queries and keys that lie in these dimensions of a head, and in one direction, have this logit.

    Without a gain it is the square root of the head's size: both have a mean square of 1 (Qwen3's `q_norm`, `k_norm`).
    The gain is that of all heads of the layer.
    """
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight[dimensions] = math.sqrt(logit / math.sqrt(attention.head_dim))


def _check_copies(drafter: PreTrainedModel, counts_V: torch.Tensor) -> None:
    """Refuse an architecture whose heads, so built, do not copy: in a repeated text, most tokens must be predicted."""
    generator = torch.Generator().manual_seed(SEED)
    once_T = torch.multinomial(counts_V + 1.0, min(CHECKED, len(counts_V)), generator=generator)
    ids_1T = torch.cat([once_T, once_T])[None]
    training = drafter.training
    found_T = drafter.eval()(input_ids=ids_1T, use_cache=False).logits[0, len(once_T) + 1 : -1].argmax(-1)
    drafter.train(training)
    share = float((found_T == once_T[2:]).float().mean())
    if share < 0.5:
        raise ValueError(
            f"init=copying: {type(drafter).__name__} with these sizes continues only {share:.0%} of a repeated text: "
            f"give init=projected, or a larger hidden_size and head_dim"
        )
