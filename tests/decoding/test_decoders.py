"""A compiled decoder agrees with the plain one, and the times of calls are measured and combined correctly."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from drafter.decoding.capabilities import decoder_of
from drafter.decoding.decoders import Compiled, Decoder, Padded
from drafter.decoding.drafting import Combined, compiled_with
from drafter.decoding.ngrams import Lookup
from drafter.decoding.options import DecodingOptions
from drafter.decoding.speculative import autoregressive_decode, speculative_decode
from drafter.decoding.timings import (
    REPEATS,
    WARM_UP,
    CallTimings,
    measure_call_timings,
    measure_reading,
    measure_several,
)
from drafter.warping import Sampling
from tests.conftest import VOCABULARY, small_model

STOP = DecodingOptions(30, stop_ids=[5])


@pytest.fixture
def _uncompiled(monkeypatch):
    """Leave functions as they are: torch.compile needs a C++ compiler, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("_uncompiled")
def test_a_compiled_pair_decodes_one_sequence_after_another_as_the_plain_one_does(target, drafter):
    compiled = [Compiled(model, 60) for model in (target, drafter)]
    for seed in range(4):
        prompt = torch.randint(0, VOCABULARY, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected = autoregressive_decode(target, prompt, STOP).tokens
        assert autoregressive_decode(compiled[0], prompt, STOP).tokens == expected
        plain = speculative_decode(target, drafter, prompt, 3, STOP)
        found = speculative_decode(*compiled, prompt, 3, STOP)  # type: ignore[call-arg]
        assert (found.tokens, found.blocks) == (expected, plain.blocks)


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # within inductor
def test_the_weights_of_a_compiled_call_are_constants():
    decoder = Compiled(small_model(3), 16).decoder()
    with torch.inference_mode():
        _, code = run_and_get_code(decoder.forward, [[1, 2]], [0], 1)
    assert "_frozen_param" in code[0]


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # within inductor
def test_calls_that_were_compiled_before_decoding_serve_it():
    target, drafter = small_model(1), small_model(2)
    pair = compiled_with(target, drafter, 60, [1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = speculative_decode(*pair, list(range(1, 13)), 1, DecodingOptions(12))
    assert found.tokens == autoregressive_decode(target, list(range(1, 13)), DecodingOptions(12)).tokens


@pytest.mark.usefixtures("_uncompiled")
def test_a_compiled_pair_compiles_nothing_while_it_decodes():
    """Compiling takes seconds to minutes, which would count as time of the first prompts."""
    pair = compiled_with(small_model(1), small_model(2), 60, [4])

    def short(one):
        return {count for count in one.model.calls if count <= one.model.longest}

    before = [short(one) for one in pair]
    for drafter in (pair[1], Combined(Lookup(), pair[1])):  # after blocks of the lookup, the model reads several tokens
        for gamma in (1, 3, 4):
            speculative_decode(pair[0], drafter, list(range(1, 13)), gamma, DecodingOptions(30))
    assert [short(one) for one in pair] == before == [{1, 5}, {1, 2, 5}]


@pytest.mark.usefixtures("_uncompiled")
def test_a_drafter_without_a_model_has_a_compiled_target():
    plain, prompt = small_model(1), [3, 4, 3, 4, 3]
    target, drafter = compiled_with(plain, Lookup(), 60, [3])
    assert isinstance(target.model, Compiled)
    found = speculative_decode(target, drafter, prompt, 3, DecodingOptions(30))
    assert found.tokens == autoregressive_decode(plain, prompt, DecodingOptions(30)).tokens
    assert any(block.drafted for block in found.blocks)
    assert drafter == Lookup()


def test_only_short_calls_are_compiled(target, monkeypatch):
    calls = []

    def compiled(function, **_):
        return lambda ids: calls.append(ids.shape[1]) or function(ids)

    monkeypatch.setattr(torch, "compile", compiled)
    speculative_decode(Compiled(target, 60, longest=4), small_model(2), [1, 2, 3, 4, 5, 6, 7], 3, DecodingOptions(10))
    assert calls
    assert max(calls) <= 4


@pytest.mark.usefixtures("_uncompiled")
def test_a_sequence_beyond_the_capacity_is_refused(target):
    with pytest.raises(ValueError, match="a sequence of 9 tokens exceeds the compiled decoder's capacity of 8"):
        autoregressive_decode(Compiled(target, 8), [1, 2, 3], DecodingOptions(20))


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_padded_calls_change_nothing_but_their_width(target, drafter, temperature, compiled):
    options = DecodingOptions(40, Sampling(temperature), stop_ids=[5])
    widths = []
    model = Compiled(target, 60) if compiled else target

    def record(module, arguments, named):
        widths.append((named["input_ids"] if "input_ids" in named else arguments[0]).shape[1])

    for seed in range(4):
        prompt = torch.randint(0, VOCABULARY, (7 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = speculative_decode(target, drafter, prompt, 3, options, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            handle = target.model.register_forward_pre_hook(record, with_kwargs=True)
            padded = Padded(model, {2: 6, 3: 6, 4: 6})
            found = speculative_decode(padded, drafter, prompt, 3, options, torch.Generator().manual_seed(seed))
            handle.remove()
        assert found.tokens == plain.tokens
        assert [block[:3] for block in found.blocks] == [block[:3] for block in plain.blocks]
    assert set(widths[1:]) & {6}
    assert not set(widths) & {2, 3, 4}


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("capacity", [None, 128])
def test_a_call_is_not_padded_beyond_the_context_or_the_capacity(target, capacity):
    decoder = decoder_of(Padded(target if capacity is None else Compiled(target, capacity), {2: 8}))
    assert isinstance(decoder, Decoder)
    decoder.forward([[1] * 120], [0], 1)
    lengths = []
    for start in (120, 119, 126):  # with padding: 128, 127, 134 tokens, and the context has 128
        assert decoder.forward([[4, 5]], [start], 2).shape[1] == 2
        lengths.append(decoder.length)
    assert lengths == [128, 127, 128]


def test_the_widths_that_pay_are_those_of_shorter_calls():
    assert CallTimings(0.1, [1.0, 1.7, 2.0, 1.3, 1.25]).widths() == {2: 5, 3: 5}  # 4% are not worth it
    assert CallTimings(0.1, [2.0, 1.0, 3.0]).widths() == {1: 2}
    assert CallTimings(0.1, [1.0, 1.0, 1.1, 1.2]).widths() == {}


def test_a_block_takes_the_time_of_its_drafts_and_its_verification():
    timings = CallTimings(drafter=0.2, target=[1.0, 1.1, 1.3])
    assert timings.ratio == pytest.approx(0.2)
    assert timings.verification(2) == pytest.approx(1.3)
    assert timings.block(2) == pytest.approx(0.2 * 2 + 1.3)


class TimedDecoder:
    """A stub whose calls advance a clock: `base` seconds and one per token; the first and the last calls are slow."""

    def __init__(self, clock, base, calls, drafts=False):
        self.clock, self.base, self.calls, self.seen, self.drafts = clock, base, calls, 0, drafts
        self.model = torch.nn.Identity()
        self.model.device = torch.device("cpu")

    def forward(self, ids, starts, keep):
        assert keep == len(ids[0]) or self.seen == 0  # of the prompt only the last logits are needed
        # Each timed call follows the cached prompt, or the draft before.
        follows = (self.seen - 1) % self.calls if self.drafts else 0
        assert starts == ([0] if self.seen == 0 else [4 + follows])
        slow = self.seen <= WARM_UP * self.calls or self.seen > (WARM_UP + REPEATS - 2) * self.calls
        self.seen += 1
        seconds = self.base + len(ids[0]) + (4 if self.drafts and not follows else 0)
        self.clock[0] += (100 if slow else 1) * seconds


@pytest.fixture
def stubs(monkeypatch):
    """Two decoders whose calls advance a clock. The drafter's first call of each block takes 4 seconds more."""
    clock = [0.0]
    monkeypatch.setattr("drafter.decoding.timings.now", lambda device: clock[0])
    return {"target": TimedDecoder(clock, 10, 3), "drafter": TimedDecoder(clock, 1, 2, drafts=True)}


def test_timings_are_medians_after_the_warm_up(monkeypatch, stubs):
    monkeypatch.setattr("drafter.decoding.timings.decoder_of", stubs.get)
    timings = measure_call_timings("target", "drafter", [1, 2, 3, 4], 2)
    assert timings == CallTimings(drafter=4, target=[11, 12, 13])


def test_a_model_that_several_drafters_have_is_timed_once(monkeypatch, stubs):
    monkeypatch.setattr("drafter.decoding.timings.decoder_of", stubs.pop)
    drafters = {"model": "drafter", "both": Combined(Lookup(), "drafter"), "ngram": Lookup()}
    found = measure_several("target", drafters, [1, 2, 3, 4], 2)
    assert found["model"] == found["both"] == CallTimings(drafter=4, target=[11, 12, 13])
    assert found["ngram"] == CallTimings(drafter=0, target=[11, 12, 13])


def test_several_sequences_are_timed_side_by_side(target, drafter):
    found = measure_several(target, {"model": drafter}, [1, 2, 3, 4], 2, rows=3)["model"]
    assert len(found.target) == 3
    assert min(found.drafter, *found.target) > 0


def test_the_reading_of_a_prompt_is_timed_without_anything_cached(monkeypatch):
    clock, starts = [0.0], []

    def decoder(model):
        def forward(ids, begins, keep):
            starts.append((begins, keep))
            clock[0] += model.base * len(ids[0])

        return SimpleNamespace(forward=forward)

    monkeypatch.setattr("drafter.decoding.timings.decoder_of", decoder)
    monkeypatch.setattr("drafter.decoding.timings.now", lambda device: clock[0])
    pair = [SimpleNamespace(base=base, device=torch.device("cpu")) for base in (10, 1)]
    assert measure_reading(pair[0], pair[1], [1, 2, 3]) == (30, 3)
    assert measure_reading(pair[0], Lookup(), [1, 2, 3]) == (30, 0)
    assert set(map(str, starts)) == {"([0], 1)"}


def test_a_prompt_shorter_than_the_longest_timed_call_is_refused(target, drafter):
    with pytest.raises(ValueError, match=r"the prompt has 3 tokens, and calls with up to gamma \+ 1 = 4"):
        measure_call_timings(target, drafter, [1, 2, 3], 3)
