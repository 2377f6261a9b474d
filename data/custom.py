"""Custom data: a file, a folder, or a dataset on the Hub, with rows in a format of `rows.py`.

The names of files tell their split, in the layouts that the Hub uses: `train.jsonl`,
`data/train-00000-of-00003.parquet`, `main/test/0000.parquet`. If the names are ambiguous, nothing
is chosen: the error lists the candidates. If there is no test file, a validation file takes its
place; otherwise that is not read, since the validation rows are split off the training rows.
"""

import glob
import os
import re
from pathlib import Path, PurePosixPath

from data.rows import NOT_RENAMED, ROW_FORMATS, Columns, RowParser, Source, read_problems
from errors import BadData, BadOption, listed
from hub import fetch

SPLITS = {  # word in the name of a file or folder -> split
    "train": "train", "test": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")
SUFFIXES = (".jsonl", ".parquet")


def parse_columns(given: tuple[str, ...]) -> Columns:
    """`--columns question=problem,answer=solution` as a mapping; BadOption if it is not one."""
    names = sorted({name for columns in ROW_FORMATS.values() for name in columns})
    renamed = {}
    for text in given:
        column, _, name = text.partition("=")
        if column not in names or not name or column in renamed:
            raise BadOption(
                f"--columns {text} does not say which column to use as one of {', '.join(names)}",
                "write --columns question=problem,answer=solution",
            )
        renamed[column] = name
    if not any(renamed.keys() <= set(columns) for columns in ROW_FORMATS.values()):
        raise BadOption(
            f"--columns {','.join(given)} mixes the columns of two row formats",
            f"rename those of one format: {listed(ROW_FORMATS)}",
        )
    return renamed


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a dataset on the Hub (owner/name or owner/name/folder), not a path."""
    if HUB_ID.fullmatch(name) is None or name.endswith((*SUFFIXES, ".json", ".csv")):
        return False
    return not os.path.exists(name)


def load_path(path: Path, columns: Columns = NOT_RENAMED) -> Source:
    """Read a file of training rows; or a folder with train.jsonl or .parquet, and perhaps a test.

    In a folder without such a training file, the Hub's layouts are searched.
    """
    if not path.is_dir():
        return _read(Source(str(path)), {"train": [path]}, columns)
    by_name = {split: _file_of_split(path, split) for split in ("train", "test")}
    if by_name["train"]:
        files = {split: [file] for split, file in by_name.items() if file}
    else:
        found = [f for depth in ("*", "*/*", "*/*/*") for f in path.glob(depth) if f.is_file()]
        names = [f.relative_to(path).as_posix() for f in found]
        chosen = choose_files(names, str(path), "add one, or give the file itself")
        files = {split: [path / name for name in names] for split, names in chosen.items()}
    return _read(Source(str(path)), files, columns)


def load_hub(name: str, revision: str | None, columns: Columns = NOT_RENAMED) -> Source:
    """Read a dataset on the Hub; owner/name/folder is one configuration of owner/name."""
    owner, repo, *inside = name.rstrip("/").split("/")
    folder, chosen = "/".join(inside), {}
    remedy = "convert it to one of these, or try --data-revision refs/convert/parquet"

    def patterns(names: list[str]) -> list[str]:
        if folder:
            names = [n for n in names if PurePosixPath(folder) in PurePosixPath(n).parents]
        chosen.update(choose_files(names, name, remedy))
        return [glob.escape(n) for files in chosen.values() for n in files]

    snapshot = fetch(
        f"{owner}/{repo}", patterns=["*.jsonl", "*.parquet"], choose=patterns, revision=revision,
        repo_type="dataset",
    )  # fmt: skip
    files = {split: [snapshot / n for n in names] for split, names in chosen.items()}
    return _read(Source(name, commit=snapshot.name), files, columns)


def choose_files(names: list[str], place: str, remedy: str) -> dict[str, list[str]]:
    """{"train": [...], "test": [...]} among the file names of a dataset.

    A configuration is a folder. A split is a word in a file's name, or a folder inside of the
    configuration. Raises BadData if there is no training file, or more than one candidate.
    """
    # configuration -> split -> label, such as "train_sft.parquet" -> its files, one per shard
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    data = [PurePosixPath(n) for n in sorted(names) if _is_data(n)]
    for path in data:
        label, folder = SHARD.sub("", path.stem), path.parent
        split = _split_in(label)
        if split is None and folder.name in SPLITS:  # such as main/train/0000.parquet
            label, split, folder = folder.name, SPLITS[folder.name], folder.parent
        if split is None and len(data) == 1:
            split = "train"
        splits = found.setdefault(str(folder), {})
        splits.setdefault(split or "none", {}).setdefault(label + path.suffix, []).append(str(path))
    configurations = [folder for folder, splits in found.items() if "train" in splits]
    if not configurations:
        among = f" among {listed(map(str, data), 4)}" if data else ""
        raise BadData(f"{place} holds no train.jsonl or train.parquet{among}", remedy)
    if len(configurations) > 1:
        raise BadData(
            f"{place} has several configurations: {', '.join(configurations[:12])}",
            f"give one of them, as in --data {place}/{configurations[0]}",
        )
    splits = found[configurations[0]]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    return {k: _only_label(splits[k], k, place) for k in ("train", "test") if k in splits}


def _is_data(name: str) -> bool:
    return name.endswith(SUFFIXES) and "/." not in f"/{name}"  # not in a hidden folder


def _split_in(label: str) -> str | None:
    words = [SPLITS[word] for word in re.split(r"[-_.]", label) if word in SPLITS]
    return words[0] if len(words) == 1 else None


def _only_label(labels: dict[str, list[str]], split: str, place: str) -> list[str]:
    """The files of a split; BadData if they have several labels, such as train_sft, train_gen."""
    exact = [label for label in labels if label.partition(".")[0] in SPLITS]
    if len(labels) > 1 and len(exact) != 1:
        raise BadData(
            f"{place} has several candidates for its {split} file: {listed(labels)}",
            "download one of them, and give the file itself",
        )
    return labels[exact[0] if exact else next(iter(labels))]


def _file_of_split(folder: Path, split: str) -> Path | None:
    return next((f for suffix in SUFFIXES if (f := folder / (split + suffix)).is_file()), None)


def _read(source: Source, files: dict[str, list[Path]], columns: Columns) -> Source:
    """Read all files into `source`, with a note on how they were understood."""
    parser = RowParser(columns)
    for split, problems in (("train", source.train), ("test", source.test)):
        for file in files.get(split, []):
            good, bad = read_problems(file, parser)
            problems += good
            source.bad += bad
    names = [
        paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        for paths in files.values()
    ]
    source.note = f"{parser.note()}; files: {', '.join(names)}"
    return source
