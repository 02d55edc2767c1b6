r"""Compare the target calls that llama-server counts above temperature 0 with those that each acceptance rule expects.

    python -m benchmarks.engine_rules --binary PATH --target DIR --drafter DIR --target-gguf FILE --drafter-gguf FILE \
        --prompts FILE.jsonl --gamma 3 --temperatures 0.6 1 --length 128 --threads 2 --out DIR

The server writes a text for each prompt at each temperature, with the drafter, in float32. On the same texts, the
models of --target and --drafter give the expected number of target calls by each rule (see
drafter.decoding.expected_efficiency). If the engine follows a rule, the two agree for it up to noise; for `argmax`
there is no noise, since the text determines the blocks. Both are counted after a text's first token, which comes from
the call that reads the prompt. DIR gets engine_rules.json and the table. docs/SERVING.md says how models are converted.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.engine_processes import LlamaServer
from benchmarks.engines import check_exists, check_small, described, read_prompts, settings_of
from drafter.artifacts.manifest import write_json
from drafter.decoding.acceptance import RULES
from drafter.decoding.evaluation import Task
from drafter.decoding.options import DecodingOptions
from drafter.metrics import Counts, by_prompt, estimate, paired_difference
from drafter.models.compatibility import load_drafter
from drafter.models.loading import load_target
from drafter.models.source import ModelSource
from drafter.warping import Sampling
from experiments.reporting.tabular import Table, with_interval
from experiments.running.engine_answers import Answer
from experiments.running.predictions import acceptance_by_rule, block_efficiencies

ENGINE = "llama-server"


class Text(NamedTuple):
    """A text of the engine, with the number of target calls by the engine's counters and by each rule."""

    prompt: str
    temperature: float
    tokens: int
    calls: Mapping[str, float]


def main() -> None:
    """Ask the server, compute the expectations, print the table, and write both."""
    arguments = parse(sys.argv[1:])
    prompts = read_prompts(arguments)
    settings = settings_of(arguments, prompts, arguments.gamma, exact=True)
    answers: list[tuple[float, str, list[int], Answer]] = []
    server = LlamaServer(
        arguments.binary, str(arguments.target_gguf), str(arguments.drafter_gguf), arguments.gamma, settings
    )
    try:
        for temperature in arguments.temperatures:
            for seed, prompt in enumerate(prompts):
                answer = server.ask(prompt.ids, arguments.gamma, temperature, seed)
                if answer.target_calls:
                    answers.append((temperature, prompt.name, prompt.ids, answer))
    finally:
        server.close()
    texts = judge(arguments.target, arguments.drafter, answers, arguments.gamma, settings.stop_ids)
    table = rules_table(texts, arguments.gamma)
    table.write(arguments.out)
    rows = [one._asdict() for one in texts]
    write_json(arguments.out / "engine_rules.json", {"arguments": described(arguments), "texts": rows})
    print(f"{table.title}\n\n{table.markdown()}")


def judge(
    target: Path | str,
    drafter: Path | str,
    answers: Sequence[tuple[float, str, list[int], Answer]],
    gamma: int,
    stops: Sequence[int],
) -> list[Text]:
    """Return for each answer the calls that the engine counts, and those that each rule expects on its text."""
    source = ModelSource.from_model(str(target))
    model, small = load_target(source), load_drafter(str(drafter), source, whole=True).eval()  # engines do not trim
    found = []
    for temperature, name, prompt, answer in answers:
        # The server leaves out the token that ends a text, and counts it.
        tokens = [*answer.tokens, *stops[:1]][: answer.generated]
        options = DecodingOptions(len(tokens), Sampling(temperature), list(stops))
        task = Task(name, name, "", [*prompt, tokens[0]], options)
        accepts = acceptance_by_rule(task, tokens[1:], model, small, RULES)
        efficiency = {rule: block_efficiencies([accept_L], gamma)[gamma - 1] for rule, accept_L in accepts.items()}
        calls = {rule: (len(tokens) - 1) / value for rule, value in efficiency.items()}
        found.append(Text(name, temperature, len(tokens) - 1, {ENGINE: float(answer.target_calls), **calls}))
    return found


def rules_table(texts: Sequence[Text], gamma: int) -> Table:
    """Return the table of τ as the engine counts it and as each rule expects it, for each temperature."""
    rows = []
    for temperature in dict.fromkeys(one.temperature for one in texts):
        chosen = [one for one in texts if one.temperature == temperature]
        by_source = {
            source: by_prompt(
                [one.prompt for one in chosen],
                [Counts(one.tokens, one.calls[source]) for one in chosen],
            )
            for source in (ENGINE, *RULES)
        }
        counted = by_source[ENGINE]
        calls = sum(one.calls[ENGINE] for one in chosen)
        row = [f"{temperature:g}", str(len(chosen)), f"{calls:,.0f}"]
        row.append(with_interval(estimate(counted, "block_efficiency")))
        for rule in RULES:
            value = estimate(by_source[rule], "block_efficiency")
            gap = paired_difference(counted, by_source[rule], "block_efficiency")
            row.append(f"{value.value:.2f} ({with_interval(gap, signed=True)})")
        rows.append(row)
    columns = ["T", "texts", "target calls", "τ as the engine counts", *(f"τ by `{rule}`" for rule in RULES)]
    note = (
        "In parentheses: how much more the engine counts than the rule expects on the same texts. In brackets: 95% "
        "bootstrap intervals over prompts."
    )
    return Table("engine_rules", f"Which acceptance rule does {ENGINE} follow? γ = {gamma}", columns, rows, note)


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Return the arguments. A wrong one ends the program with a sentence that names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=ENGINE, help="llama-server's binary")
    for name, what in (
        ("target", "the target's directory"),
        ("drafter", "the drafter's directory"),
        ("target-gguf", "the target as a GGUF file in float32"),
        ("drafter-gguf", "the drafter as a GGUF file in float32"),
        ("prompts", "JSON lines with `prompt`"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--count", type=int, help="how many of the prompts, evenly spaced; all if left out")
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--length", type=int, default=128, help="the most tokens of a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("engine_rules"))
    found = parser.parse_args(given)
    check_small(parser, found, {"count": 1, "gamma": 1, "length": 2, "threads": 1})
    for name in ("target", "drafter", "target_gguf", "drafter_gguf", "prompts"):
        check_exists(parser, found, name)
    if min(found.temperatures) <= 0:
        parser.error(f"--temperatures are {found.temperatures}, must be above 0: at 0 all rules are the same")
    found.tokenizer = str(found.target)
    return found


if __name__ == "__main__":
    main()
