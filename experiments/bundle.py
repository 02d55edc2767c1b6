"""Pack what the target has written into one small file, from which another run can start. Config: conf/bundle.yaml.

The target may write for hours, and what it writes is small. The file contains the prepared data, the instructions and
the text that the target wrote for them, and its responses. It leaves out the hidden states that `respond` keeps beside
the responses (`respond.states`), because they take hundreds of times as many bytes as the tokens.

Unpack the file into the root of another run before its first stage. With the same settings and the same target,
`prepare` and `respond` then find their work done. `cache` computes the hidden states again in one pass over the
responses, which takes a fraction of the time of writing them. The states differ by rounding alone.
"""

import shlex
import tarfile
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from drafter.artifacts.manifest import MANIFEST, fingerprint, read_manifest, require
from drafter.artifacts.storage import Folder, whole_file
from drafter.data.states import copy_without_states
from experiments.exporting.recipe import absolute_paths
from experiments.running.commands import command
from experiments.running.recipes import self_sources


@command("bundle")
def main(cfg: DictConfig) -> None:
    """Write the file, and print how to unpack it and which paths of this machine it names.

    Raises:
        ArtifactError: `prepare` or `respond` has not finished, or the responses were written for other data.
    """
    data, responses = Path(cfg.inputs.data), Path(cfg.inputs.responses)
    asked = read_manifest(responses, "respond")["inputs"].get("data")
    require(responses, "data", asked, fingerprint(data, "prepare"))
    with tempfile.TemporaryDirectory() as folder, whole_file(Path(cfg.out)) as file:
        copy_without_states(responses, Folder(folder))
        with tarfile.open(fileobj=file, mode="w:xz", encoding="utf-8") as archive:
            members = [(path, Path(data.name) / path.name) for path in sorted(data.iterdir()) if path.is_file()]
            members += [(path, Path(responses.name) / path.name) for path in sorted(Path(folder).iterdir())]
            for source in self_sources(cfg):
                written = Path(source.directory)
                for name in (MANIFEST, f"{source.part}.jsonl"):
                    members.append((written / name, Path(source.part) / source.name / name))
            for path, member in members:
                archive.add(path, str(member), filter=anonymous)
            named = absolute_paths(*(path for path, _ in members if path.name == MANIFEST))
    size = Path(cfg.out).stat().st_size / 1e6
    print(f"{cfg.out}: {size:.1f} MB with the prepared data and the target's responses, without its hidden states\n")
    print("To start a run from it, unpack it into the run's root before the first stage. For the same root as here:")
    print(f"  mkdir -p {shlex.quote(cfg.root)} && tar -xJf {shlex.quote(cfg.out)} -C {shlex.quote(cfg.root)}")
    print("There `prepare` and `respond` have nothing to do if their settings and the target are the same.")
    if named:
        print(f"\nBefore you publish it: its manifests name paths of this machine, {', '.join(named)}.")
        print("Runs whose paths are relative to the working directory do not have them.")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without its owner and time, so that equal contents give equal files."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


if __name__ == "__main__":
    main()
