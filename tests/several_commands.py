"""Run several stages in one process, or in the ranks of one torchrun, because the imports of a process take seconds.

    python -m tests.several_commands FILE

FILE is a JSON list of pairs: the name of a stage, and its overrides.
"""

import json
import sys
from pathlib import Path

from tests.experiments.test_pipeline import stage


def main() -> None:
    for name, overrides in json.loads(Path(sys.argv[1]).read_text()):
        print(name, overrides, file=sys.stderr, flush=True)  # the last line names the command that failed
        stage(name, overrides)


if __name__ == "__main__":
    main()
