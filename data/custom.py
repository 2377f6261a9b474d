"""Custom data: files, folders, or datasets on the Hub, with rows in a format of `rows.py`.

The names of files say which split they are, in the layouts that the Hub uses: `train.jsonl`,
`data/train-00000-of-00003.parquet`, `main/test/0000.parquet`. If the names are ambiguous, nothing
is chosen: the error lists the candidates. If there is no test file, a validation file takes its
place, since the rows for validation are split off the training rows. Other data files are named as
not read.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.problems import Source
from data.row_files import FROM_ARROW, OTHER_KINDS, SUFFIXES, UNPACK, row_suffix
from data.rows import (
    ADDED_COLUMNS,
    NOT_RENAMED,
    ROW_FORMATS,
    Columns,
    RowParser,
    read_problems,
)
from data.turns import name_list
from errors import BadData, BadOption, listed
from hub import fetch

SPLITS = {  # word in the name of a file or folder -> split
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
}  # fmt: skip
VALIDATION = tuple(word for word, split in SPLITS.items() if split == "validation")
PATTERNS = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]
SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(/[\w./-]+)?")
GIVE_FILES = "add one, or give the files themselves: --data FILE,FILE"
PACKED = (".gz",)  # of files of rows that are texts
LIKELY = (".jsonl", ".parquet")  # files of other kinds are only looked at if none of these fits
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
            "config.json", "package.json", "metadata.json", "croissant.json")  # fmt: skip


def parse_columns(given: tuple[str, ...]) -> Columns:
    """`--columns question=problem,answer=solution` as a mapping; BadOption if it is not one.

    `tools=` is a column that is not read although rows have it.
    """
    formats = {name for columns in ROW_FORMATS.values() for name in columns}
    names = sorted(formats | set(ADDED_COLUMNS))
    renamed = {}
    for text in given:
        column, equals, name = text.partition("=")
        known = column in names if name else equals and column and column not in formats
        if not known or column in renamed:
            raise BadOption(
                f"--columns {text} does not say which column to use as one of {', '.join(names)}",
                "write --columns question=problem,answer=solution",
            )
        renamed[column] = name
    of_format = {column for column, name in renamed.items() if name} - set(ADDED_COLUMNS)
    if not any(of_format <= set(columns) for columns in ROW_FORMATS.values()):
        raise BadOption(
            f"--columns {','.join(given)} mixes the columns of two row formats",
            f"rename those of one format: {listed(ROW_FORMATS)}",
        )
    return renamed


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a dataset on the Hub (owner/name or owner/name/folder), not a path."""
    if HUB_ID.fullmatch(name) is None or name.endswith((*SUFFIXES, *OTHER_KINDS)):
        return False
    return not os.path.exists(name) and not os.path.isfile(name.partition("/")[0])


def load_path(path: Path, columns: Columns = NOT_RENAMED) -> Source:
    """Read a file of training rows; or a folder with a training file, and perhaps a test file.

    Files of a folder that are named exactly train.*, test.* and valid.* take precedence over
    the Hub's layouts.
    """
    source = Source(str(path))
    if not path.is_dir():
        return _read(source, {"train": [path]}, columns)
    if (main := path / "refs" / "main").is_file():  # a repository's folder in the Hub's cache
        path = path / "snapshots" / main.read_text("utf-8", "replace").strip()
    gone = [f.name for f in path.glob("*") if f.is_symlink() and not f.exists()]
    if gone := [name for name in gone if row_suffix(name)]:
        raise BadData(
            f"{path} holds links to files that are not there: {listed(sorted(gone), 3)}",
            "copy the files to this machine, or delete the links",
        )
    names = [file.name for file in path.glob("*") if file.is_file()]
    chosen = _exactly_named(names)
    if not chosen:
        found = [f for depth in ("*", "*/*", "*/*/*") for f in path.glob(depth) if f.is_file()]
        names = [file.relative_to(path).as_posix() for file in found]
        cause, remedy = _other_folder(names)
        try:
            chosen = choose_files(names, str(path), remedy or GIVE_FILES)
        except BadData:
            if not cause:
                raise
            raise BadData(f"{path} {cause}", remedy) from None
    files = {split: [path / name for name in names] for split, names in chosen.items()}
    return _read(source, files, columns, _not_chosen(names, chosen))


def load_hub(name: str, revision: str | None, columns: Columns = NOT_RENAMED) -> Source:
    """Read a dataset on the Hub; owner/name/folder is one configuration of owner/name."""
    owner, repo, *inside = name.rstrip("/").split("/")
    folder, chosen, others = "/".join(inside), {}, list[str]()
    remedy = "convert it to one of these, or try --data-revision refs/convert/parquet"

    def patterns(names: list[str]) -> list[str]:
        if folder:
            names = [n for n in names if PurePosixPath(folder) in PurePosixPath(n).parents]
        chosen.update(choose_files(names, name, remedy))
        others[:] = _not_chosen(names, chosen)
        return [glob.escape(n) for files in chosen.values() for n in files]

    snapshot = fetch(
        f"{owner}/{repo}", patterns=PATTERNS, choose=patterns, revision=revision,
        repo_type="dataset",
    )  # fmt: skip
    files = {split: [snapshot / n for n in names] for split, names in chosen.items()}
    return _read(Source(name, commit=snapshot.name), files, columns, others)


def choose_files(names: list[str], place: str, remedy: str) -> dict[str, list[str]]:
    """{"train": [...], "test": [...]} among the file names of a dataset.

    A configuration is a folder. A split is a word in a file's name, or a folder inside of the
    configuration. Raises BadData if there is no training file, or more than one candidate.
    """
    data = [PurePosixPath(n) for n in sorted(names) if _is_data(n)]
    likely = [path for path in data if path.suffix in LIKELY]
    every = _by_configuration(data)
    for found in (_by_configuration(likely), every, _only_file(likely), _only_file(data)):
        if any("train" in splits for splits in found.values()):
            break
    configurations = [folder for folder, splits in found.items() if "train" in splits]
    if not configurations:
        among = f" among {listed(map(str, data), 4)}" if data else ""
        raise BadData(f"{place} holds no train.jsonl or train.parquet{among}", remedy)
    if len(configurations) > 1:
        raise BadData(
            f"{place} has several configurations: {', '.join(configurations[:12])}",
            f"give one of them, as in --data {place}/{configurations[0]}",
        )
    splits = every.get(configurations[0], {}) | found[configurations[0]]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    return {k: _only_label(splits[k], k, place) for k in ("train", "test") if k in splits}


# configuration -> split -> label, such as "train_sft.parquet" -> its files, one per shard
Found = dict[str, dict[str, dict[str, list[str]]]]


def _by_configuration(data: list[PurePosixPath]) -> Found:
    found: Found = {}
    for path in data:
        ending = path.name[len(_stem(path.name)) :]
        label, folder = _stem(SHARD.sub("", path.name)), path.parent
        split = _split_in(label)
        if split is None and folder.name.lower() in SPLITS:  # such as main/train/0000.parquet
            label, split, folder = folder.name, SPLITS[folder.name.lower()], folder.parent
        splits = found.setdefault(str(folder), {})
        splits.setdefault(split or "none", {}).setdefault(label + ending, []).append(str(path))
    return found


def _only_file(data: list[PurePosixPath]) -> Found:
    """A single file without a split in its name, or its shards, is the training file."""
    found = _by_configuration(data)
    labels = [label for splits in found.values() for names in splits.values() for label in names]
    return {
        folder: {"train": splits["none"]}
        for folder, splits in found.items()
        if "none" in splits and len(labels) == 1
    }


def _is_data(name: str) -> bool:
    """Whether a file can hold rows, and is in no hidden folder."""
    path = PurePosixPath(name)
    return row_suffix(name) is not None and path.name not in METADATA and "/." not in f"/{name}"


def _stem(name: str) -> str:
    """A file's name without the suffix of its kind."""
    packed = len(".gz") if name.lower().endswith(".gz") else 0
    return name[: len(name) - packed - len(row_suffix(name) or "")]


def _exactly_named(names: list[str]) -> dict[str, list[str]]:
    """{"train": [...], "test": [...]} of files named after their split alone; {} if none is."""
    endings = [*SUFFIXES, *(suffix + packed for suffix in SUFFIXES for packed in PACKED)]

    def first(*words: str) -> list[str]:
        return [n for word in words for ending in endings if (n := word + ending) in names][:1]

    chosen = {"train": first("train"), "test": first("test") or first(*VALIDATION)}
    return {split: files for split, files in chosen.items() if files} if chosen["train"] else {}


def _not_chosen(names: list[str], chosen: dict[str, list[str]]) -> list[str]:
    """The data files among `names` that are not read."""
    read = {name for files in chosen.values() for name in files}
    return [name for name in sorted(names) if _is_data(name) and name not in read]


def _other_folder(names: list[str]) -> tuple[str, str]:
    """(what a folder without data files is, remedy); empty texts if that is not known."""
    if any(name.endswith(".arrow") for name in names):
        command = (
            FROM_ARROW if "dataset_dict.json" in names else FROM_ARROW.replace("['train']", "")
        )
        return "was written by datasets.save_to_disk", f"write it as JSON lines: {command}"
    packed = [name for name in names if OTHER_KINDS.get(PurePosixPath(name).suffix) == UNPACK]
    if packed:
        return f"holds packed files ({listed(packed, 3)})", UNPACK
    return "", ""


def _split_in(label: str) -> str | None:
    words = [SPLITS[word] for word in re.split(r"[-_. ]", label.lower()) if word in SPLITS]
    return words[0] if len(words) == 1 else None


def _only_label(labels: dict[str, list[str]], split: str, place: str) -> list[str]:
    """The files of a split; BadData if they have several labels, such as train_sft, train_gen."""
    exact = [label for label in labels if label.lower().partition(".")[0] in SPLITS]
    if len(labels) > 1 and len(exact) != 1:
        raise BadData(
            f"{place} has several candidates for its {split} file: {listed(labels)}",
            "download one of them, and give the file itself",
        )
    return labels[exact[0] if exact else next(iter(labels))]


def _read(
    source: Source,
    files: dict[str, list[Path]],
    columns: Columns,
    not_read: Sequence[str] = (),
) -> Source:
    """Read all files into `source`, with a note on how they were understood."""
    parser = RowParser(columns)
    for split, problems in (("train", source.train), ("test", source.test)):
        for file in files.get(split, []):
            good, bad = read_problems(file, parser)
            problems += good
            source.bad += bad
    names = []
    for split, (first, *more) in files.items():
        words = {first.parent.name.lower(), *re.split(r"[-_. ]", first.name.lower())}
        used_as = " as test" if split == "test" and words & set(VALIDATION) else ""
        names.append(first.name + (f" and {len(more)} more" if more else "") + used_as)
    parts = [parser.note(), f"files: {', '.join(names)}"]
    if not_read:
        parts.append(f"files not read: {name_list(not_read)}")
    source.note = "; ".join(part for part in parts if part)
    return source
