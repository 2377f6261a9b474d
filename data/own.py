"""Own data: a file, a folder, or a dataset of the Hub, its rows in one of the forms of `rows.py`.

Files are known by their names, as the Hub lays them out: `train.jsonl`,
`data/train-00000-of-00003.parquet`, `main/test/0000.parquet`. Where the names leave a choice,
nothing is chosen: the error lists what there is. Where there is no test file, a validation file is
taken for it; otherwise that is not read, since what is held out is a share of the rows to learn.
"""

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from data.rows import ROW_FORMATS, SAME, Reader, Source, read_problems
from errors import BadData, BadOption, listed
from hub import fetch

SPLITS = {
    "train": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")
FILES = (".jsonl", ".parquet")


def parse_columns(given: tuple[str, ...]) -> dict[str, str]:
    """`--columns question=problem,answer=solution` as a mapping; BadOption if it can be none."""
    names = sorted({name for form in ROW_FORMATS.values() for name in form})
    columns = {}
    for text in given:
        ours, _, theirs = text.partition("=")
        if ours not in names or not theirs or ours in columns:
            raise BadOption(
                f"--columns {text} does not say which column stands for one of {', '.join(names)}",
                "write --columns question=problem,answer=solution",
            )
        columns[ours] = theirs
    if not any(columns.keys() <= set(form) for form in ROW_FORMATS.values()):
        raise BadOption(
            f"--columns {','.join(given)} mixes the columns of two forms",
            f"name those of one: {listed(ROW_FORMATS)}",
        )
    return columns


def is_hub_id(name: str) -> bool:
    """Whether `name` is no path and may be a dataset of the Hub: owner/name, or .../folder."""
    if HUB_ID.fullmatch(name) is None or name.endswith((*FILES, ".json", ".csv")):
        return False
    return not os.path.exists(name)


def load_path(path: Path, columns: Mapping[str, str] = SAME) -> Source:
    """A folder with train.jsonl (or .parquet), perhaps test.jsonl; or one file of rows to learn.

    Without a train.jsonl or train.parquet, a folder's files are looked for as those of the Hub.
    """
    if not path.is_dir():
        return _read(Source(str(path)), {"train": [path]}, columns)
    plain = {split: _plain_file(path, split) for split in ("train", "test")}
    if plain["train"]:
        files = {split: [file] for split, file in plain.items() if file}
    else:
        found = [f for depth in ("*", "*/*", "*/*/*") for f in path.glob(depth) if f.is_file()]
        names = [f.relative_to(path).as_posix() for f in found]
        remedy = "add it, or give the file itself"
        files = {k: [path / n for n in v] for k, v in choose(names, str(path), remedy).items()}
    return _read(Source(str(path)), files, columns)


def load_hub(name: str, revision: str | None, columns: Mapping[str, str] = SAME) -> Source:
    """A dataset of the Hub, owner/name, of which owner/name/folder is one configuration."""
    owner, repo, *within = name.rstrip("/").split("/")
    folder, chosen = "/".join(within), {}
    remedy = "convert it to one of these, or try --data-revision refs/convert/parquet"

    def patterns(names: list[str]) -> list[str]:
        if folder:
            names = [n for n in names if PurePosixPath(folder) in PurePosixPath(n).parents]
        chosen.update(choose(names, name, remedy))
        return [glob.escape(n) for files in chosen.values() for n in files]

    place = fetch(
        f"{owner}/{repo}", patterns=["*.jsonl", "*.parquet"], choose=patterns, revision=revision,
        repo_type="dataset",
    )  # fmt: skip
    source = Source(name, commit=place.name)
    return _read(source, {k: [place / n for n in names] for k, names in chosen.items()}, columns)


def choose(names: list[str], place: str, remedy: str) -> dict[str, list[str]]:
    """{"train": files to learn from, "test": ...} of the files in a dataset; BadData if in doubt.

    A configuration is a folder; a split is the word before a shard's number, or a folder in it.
    """
    # configuration -> split -> what the file calls it -> files
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    data = [PurePosixPath(n) for n in sorted(names) if n.endswith(FILES) and "/." not in f"/{n}"]
    for path in data:
        label, folder = SHARD.sub("", path.stem), path.parent
        split = _split(label)
        if split is None and folder.name in SPLITS:  # as in main/train/0000.parquet
            label, split, folder = folder.name, SPLITS[folder.name], folder.parent
        if split is None and len(data) == 1:
            split = "train"
        splits = found.setdefault(str(folder), {})
        splits.setdefault(split or "none", {}).setdefault(label + path.suffix, []).append(str(path))
    able = [folder for folder, splits in found.items() if "train" in splits]
    if not able:
        there = f" among {listed(map(str, data), 4)}" if data else ""
        raise BadData(f"{place} holds no train.jsonl or train.parquet{there}", remedy)
    if len(able) > 1:
        raise BadData(
            f"{place} has several configurations: {', '.join(able[:12])}",
            f"give one of them, as in --data {place}/{able[0]}",
        )
    splits = found[able[0]]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    return {k: _only(splits[k], k, place) for k in ("train", "test") if k in splits}


def _split(label: str) -> str | None:
    words = [SPLITS[word] for word in re.split(r"[-_.]", label) if word in SPLITS]
    return words[0] if len(words) == 1 else None


def _only(labels: dict[str, list[str]], split: str, place: str) -> list[str]:
    """The files of a split; BadData if they are of several, such as train_sft and train_gen."""
    exact = [label for label in labels if label.partition(".")[0] in SPLITS]
    if len(labels) > 1 and len(exact) != 1:
        raise BadData(
            f"{place} has several files to {'learn from' if split == 'train' else 'be tested on'}:"
            f" {listed(labels)}",
            "download the one that is meant, and give the file itself",
        )
    return labels[exact[0] if exact else next(iter(labels))]


def _plain_file(folder: Path, split: str) -> Path | None:
    return next((f for suffix in FILES if (f := folder / (split + suffix)).is_file()), None)


def _read(source: Source, files: dict[str, list[Path]], columns: Mapping[str, str]) -> Source:
    """The problems of all files into `source`, with a note of how they were understood."""
    read = Reader(columns)
    for split, problems in (("train", source.train), ("test", source.test)):
        for file in files.get(split, []):
            good, bad = read_problems(file, read)
            problems += good
            source.bad += bad
    named = {split: [f.name for f in found] for split, found in files.items()}
    source.note = f"{read.note()}; files: " + ", ".join(
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for names in named.values()
    )
    return source
