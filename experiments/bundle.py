"""Pack what took the target hours into one small file, from which another run starts. Config: conf/bundle.yaml.

The file has the prepared data, what the target wrote for them, and its responses without their hidden states, which
take hundreds of times as many bytes as the tokens. In a root to which it is unpacked, `prepare` and `respond` with the
same settings and the same target are up to date. `cache` then reads the responses once, in a fraction of the time of
writing them; the states differ from those that responding kept by rounding alone.
"""

import tarfile
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from drafter.artifacts.manifest import MANIFEST, fingerprint, read_manifest, require
from drafter.artifacts.storage import Folder, whole_file
from drafter.data.states import copy_without_states
from experiments.exporting.recipe import ABSOLUTE
from experiments.running.commands import command
from experiments.running.recipes import self_sources


@command("bundle")
def main(cfg: DictConfig) -> None:
    """Write the file, and say how it is unpacked.

    Raises:
        ArtifactError: the data or the responses are not finished, or the responses are to other data.
    """
    data, responses = Path(cfg.inputs.data), Path(cfg.inputs.responses)
    asked = read_manifest(responses, "respond")["inputs"].get("data")
    require(responses, "data", asked, fingerprint(data, "prepare"))
    with tempfile.TemporaryDirectory() as folder, whole_file(Path(cfg.out)) as file:
        copy_without_states(responses, Folder(folder))
        with tarfile.open(fileobj=file, mode="w:xz") as archive:
            members = [(path, Path(data.name) / path.name) for path in sorted(data.iterdir()) if path.is_file()]
            members += [(path, Path(responses.name) / path.name) for path in sorted(Path(folder).iterdir())]
            for source in self_sources(cfg):
                written = Path(source.directory)
                for name in (MANIFEST, f"{source.part}.jsonl"):
                    members.append((written / name, Path(source.part) / source.name / name))
            for path, member in members:
                archive.add(path, str(member), filter=anonymous)
            named = {found for path, _ in members if path.name == MANIFEST for found in paths_in(path)}
    print(f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB. Unpack it before a run's first stage:")
    print(f"  mkdir -p {cfg.root} && tar -xJf {cfg.out} -C {cfg.root}")
    if named:
        print(f"\nBefore you publish it: its manifests name {', '.join(sorted(named))}")


def paths_in(path: Path) -> list[str]:
    """Return the absolute paths that a file names."""
    return [found[0] for found in ABSOLUTE.finditer(path.read_text(encoding="utf-8"))]


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without its owner and time, so that equal contents give equal files."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


if __name__ == "__main__":
    main()
