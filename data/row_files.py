"""Files of rows: JSON lines, JSON arrays, tables with a header, and parquet; texts also in gzip.

Nothing is guessed or repaired. A file whose content is not what its name says, or that other
software would have to open first, is refused with what it is and a remedy.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.turns import JSON_NOTATION, PYTHON, BadRow, unique_keys
from errors import BadData

Rows = Iterator[tuple[int, Any]]
# A tiny file can encode a billion equal rows. So no more than MAX_EXPANSION bytes of rows are read
# for each byte of a packed file, or MIN_LIMIT bytes if that is more; text compresses to a tenth.
MAX_EXPANSION, MIN_LIMIT = 100, 2**28
# Bytes that Python takes in addition to the text: for a row or a list in it, and for a value.
ROW_OVERHEAD, VALUE_OVERHEAD = 200, 50
BAD_LINES_ALLOWED = 0.01  # fraction; with more, the file is tried as a whole
SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv")  # texts also with .gz
FIRST_BYTES = 4096  # bytes by which a file's kind is known
UTF8_BOM = b"\xef\xbb\xbf"  # some editors write it
JSON_STARTS = (b'{"', b"[{", b"[\n", b"{\n")
UNPACK = "unpack it, and give the file or folder that was packed"
CONVERT = "convert it to .jsonl, one row per problem"
TO_UTF8 = "save it as UTF-8 in an editor, or with: iconv -f {} -t UTF-8 OLD > NEW"
FROM_ARROW = (
    'python -c "from datasets import load_from_disk;'
    " load_from_disk('FOLDER')['train'].to_json('train.jsonl')\""
)
FOREIGN = (  # first bytes, the kind of file that has them, remedy
    (b"version https://git-lfs", "a Git LFS pointer, not the data themselves",
     "fetch the file with git lfs pull, or download it from its page"),
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"\x1f\x8b", "compressed with gzip", "rename it so that it ends in .gz, or unpack it"),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"\xfd7zXZ", "compressed with xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"PAR1", "a parquet file", "rename it so that it ends in .parquet"),
    (b"ARROW1", "an Arrow file", f"write it as JSON lines: {FROM_ARROW}"),
    (b"\xff\xff\xff\xff", "an Arrow stream, as datasets.save_to_disk writes it",
     "write it as JSON lines: python -c \"from datasets import Dataset;"
     " Dataset.from_file('FILE').to_json('train.jsonl')\""),
    (b"FEA1", "a Feather file", CONVERT),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook", "save the sheet as CSV UTF-8"),
    (b"SQLite format 3", "an SQLite database", CONVERT),
    (b"%PDF", "a PDF document", CONVERT),
    (b"\x93NUMPY", "a NumPy array", CONVERT),
    (b"\x80\x02", "a pickle, which is never opened", CONVERT),
    (b"\x80\x03", "a pickle, which is never opened", CONVERT),
    (b"\x80\x04", "a pickle, which is never opened", CONVERT),
    (b"\x80\x05", "a pickle, which is never opened", CONVERT),
    (b"\xff\xfe\x00\x00", "text in UTF-32, not UTF-8", TO_UTF8.format("UTF-32")),
    (b"\xff\xfe", "text in UTF-16, not UTF-8", TO_UTF8.format("UTF-16")),
    (b"\xfe\xff", "text in UTF-16, not UTF-8", TO_UTF8.format("UTF-16")),
)  # fmt: skip
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
NO_HTML = "download the file itself: on the Hub, its address has /resolve/, not /blob/"
OTHER_KINDS = {  # suffix -> remedy
    ".txt": "plain texts are not supported: write rows with a question and an answer, as .jsonl",
    ".md": "plain texts are not supported: write rows with a question and an answer, as .jsonl",
    ".xlsx": "save the sheet as CSV UTF-8",
    ".xls": "save the sheet as CSV UTF-8",
    ".arrow": f"write it as JSON lines: {FROM_ARROW}",
    ".gz": "name it after what it holds, as in rows.jsonl.gz",
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".tar.gz", ".bz2", ".xz", ".zst", ".7z", ".rar"), UNPACK
    ),
}


def read_rows(path: Path) -> Rows:
    """Yield (line or row number from 1, row); a line that is no row yields its BadRow.

    Raises BadData if the file as a whole cannot be read.
    """
    suffix, packed = row_suffix(path.name), path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as file:
            head = file.read(FIRST_BYTES)
        _refuse_foreign(path, head, suffix, packed=packed)
        if suffix is None and head.removeprefix(UTF8_BOM).lstrip()[:2] in JSON_STARTS:
            raise BadData(
                f"{path} holds JSON, but its name ends in none of {', '.join(SUFFIXES)}",
                "rename it so that it ends in .jsonl",
            )
        if suffix is None:
            ending = "".join(path.suffixes[-2:]).lower()
            remedy = OTHER_KINDS.get(ending) or OTHER_KINDS.get(path.suffix.lower()) or CONVERT
            raise BadData(f"{path} is not one of {', '.join(SUFFIXES)}", remedy)
        if suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            data = _unpacked(path, suffix) if packed else path.read_bytes()
            read = _read_json if suffix in (".jsonl", ".json") else _read_table
            yield from read(path, data.removeprefix(UTF8_BOM))
    except OSError as error:
        raise BadData(
            f"{path} cannot be read: {error.strerror or error}", "check the path"
        ) from None


def row_suffix(name: str) -> str | None:
    """The one of `SUFFIXES` that a file's name ends with, perhaps before .gz; None without one."""
    plain = name.lower().removesuffix(".gz")
    suffix = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)
    return None if suffix == ".parquet" and plain != name.lower() else suffix


def is_table(path: Path) -> bool:
    """Whether a file's first line names the columns."""
    return row_suffix(path.name) in (".csv", ".tsv")


def _refuse_foreign(path: Path, head: bytes, suffix: str | None, *, packed: bool) -> None:
    """Raise BadData if the first bytes of a file say that it is not what its name says."""
    own = GZIP if packed else b"PAR1" if suffix == ".parquet" else None
    for magic, what, remedy in FOREIGN:
        if head.startswith(magic) and magic != own:
            if magic == ZIP and (b"[Content_Types].xml" in head or b"xl/" in head):
                what, remedy = "an Excel workbook", OTHER_KINDS[".xlsx"]
            raise BadData(f"{path} is {what}", remedy)
    if head[257:262] == b"ustar":
        raise BadData(f"{path} is a tar archive", UNPACK)
    if packed and head and not head.startswith(GZIP):
        raise BadData(f"{path} is not compressed with gzip", "remove .gz from its name")
    if own:
        return
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise BadData(f"{path} is an HTML page, not the data themselves", NO_HTML)
    if head[:64].count(0) > len(head[:64]) // 3:  # every second byte, without a byte order mark
        raise BadData(f"{path} is text in UTF-16, not UTF-8", TO_UTF8.format("UTF-16LE"))


def _unpacked(path: Path, suffix: str) -> bytes:
    """The content of a gzip file, unless Python would need far more memory for it than it has."""
    limit = max(MIN_LIMIT, MAX_EXPANSION * path.stat().st_size)
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(limit + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(
            f"{path} is not a readable gzip file: {str(error)[:80]}",
            "download it or write it again",
        ) from None
    _refuse_foreign(path, data[:FIRST_BYTES], suffix, packed=False)
    lists = data.count(b"{") + data.count(b"[") + data.count(b"\n")
    if len(data) + ROW_OVERHEAD * lists + VALUE_OVERHEAD * data.count(b",") > limit:
        raise BadData(
            f"{path} cannot be read: its rows are far larger than the file",
            "unpack it, if it is what it should be",
        )
    return data


def _read_json(path: Path, data: bytes) -> Rows:
    """Rows on a line each, or in one array; the file's suffix does not matter."""
    broken_array = None
    if data.lstrip()[:1] == b"[":
        try:
            whole = json.loads(data, object_pairs_hook=unique_keys)
            if isinstance(whole, list):
                yield from enumerate(whole, 1)
                return
        except BadRow as fault:
            raise BadData(f"{path}: {fault}", fault.remedy) from None
        except (ValueError, RecursionError) as error:
            broken_array = error
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows = [(number, _row_of_line(line)) for number, line in lines]
    bad = sum(isinstance(row, BadRow) for _, row in rows)
    if bad > BAD_LINES_ALLOWED * len(rows):
        _refuse_broken_array(path, data, broken_array)
        objects = _spread_objects(data)
        if len(objects) > 1:
            raise BadData(
                f"{path}: its rows are spread over several lines",
                "write each row on one line, without indent: jq -c . OLD > NEW.jsonl",
            )
        rows = list(enumerate(objects, 1)) or rows
    yield from rows


def _row_of_line(line: bytes) -> Any:
    """The JSON value on a line, or a BadRow that says why it is not JSON, with a remedy."""
    try:
        return json.loads(line, object_pairs_hook=unique_keys)
    except BadRow as fault:
        return fault
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON in UTF-8 ({str(error)[:60]})", _line_remedy(line, error))


def _line_remedy(line: bytes, error: Exception) -> str:
    line = line.strip()
    if isinstance(error, UnicodeDecodeError):
        return TO_UTF8.format("WINDOWS-1252")
    if isinstance(error, RecursionError):
        return "leave this line out: it is nested too deeply"
    if line.endswith(b",") and _is_json(line[:-1]):
        return (
            "remove the comma after each row: sed 's/,[[:space:]]*$//' OLD > NEW; or make the file"
            " one array, with [ before the first row and ] instead of the last comma"
        )
    if PYTHON.match(line):
        return JSON_NOTATION
    if line.replace(b" ", b"").endswith((b",}", b",]", b",]}")):
        return "remove the comma before the closing bracket: JSON does not allow it"
    if "Extra data" in str(error) and line.startswith(b"{"):
        return "put each row on a line of its own"
    if "control character" in str(error):
        return 'write line breaks and tabs inside texts as "\\n" and "\\t", as json.dumps does'
    if not line.startswith((b"{", b"[")) and b"," in line:
        return "if the file is a table with commas, name it .csv; else write each row as JSON"
    return "correct the line, or write the rows again, each with json.dumps(row)"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


def _refuse_broken_array(path: Path, data: bytes, fault: Exception | None) -> None:
    """Raise BadData if the file should have been one array, and has a `fault`."""
    if not isinstance(fault, json.JSONDecodeError) or "Extra data" in fault.msg:
        return
    if not _is_json(data.lstrip().partition(b"\n")[0]):  # else it has an array on each line
        raise BadData(
            f"{path} is not a JSON array: line {fault.lineno}, column {fault.colno}: {fault.msg}",
            "correct that place: rows are separated by one comma, and ] follows the last one"
            " without a comma",
        )


def _spread_objects(data: bytes) -> list[dict]:
    """The first two objects of a file, or the only one, if the first is on several lines."""
    decoder, objects = json.JSONDecoder(), list[dict]()
    try:
        rest = data.decode().strip()
        while rest and len(objects) < 2:
            value, end = decoder.raw_decode(rest)
            if not isinstance(value, dict) or (not objects and "\n" not in rest[:end]):
                return []
            objects.append(value)
            rest = rest[end:].lstrip()
    except (ValueError, RecursionError):
        return []
    return objects


def _read_table(path: Path, data: bytes) -> Rows:
    """Rows of a table whose first line names the columns; cells may have quotes and line breaks."""
    if data.lstrip()[:1] in (b"{", b"[") and _is_json(data.lstrip().partition(b"\n")[0]):
        raise BadData(f"{path} holds JSON, not a table", "rename it so that it ends in .jsonl")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadData(
            f"{path} is not text in UTF-8 ({str(error)[:60]})",
            f"in Excel, save it as CSV UTF-8; or {TO_UTF8.format('WINDOWS-1252')}",
        ) from None
    csv.field_size_limit(2**31 - 1)  # by default no more than 128 KiB
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    try:
        yield from _table_rows(path, cells)
    except csv.Error as error:
        raise BadData(
            f"{path} is not a table: line {cells.line_num}: {error}",
            'put quotes around texts with commas, quotes or line breaks, and write " in them as ""',
        ) from None


def _delimiter(path: Path, text: str) -> str:
    """What separates the cells of a header: in many countries, Excel writes semicolons."""
    if row_suffix(path.name) == ".tsv":
        return "\t"
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])  # without the names in quotes
    return max((",", ";", "\t", "|"), key=header.count)


def _table_rows(path: Path, cells: Iterator[list[str]]) -> Rows:
    names = [name.strip() for name in next(cells, [])]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BadData(
            f"{path}: several columns are named {repeated[0] or 'nothing'}", "rename one of them"
        )
    for number, row in enumerate(cells, 1):
        if not any(cell.strip() for cell in row):
            continue  # an empty line, or one of separators alone, is not a row
        if len(row) == len(names):
            yield number, dict(zip(names, row))
            continue
        remedy = "put quotes around texts that contain commas or line breaks"
        if len(row) < len(names):
            remedy = "write every cell, also the empty ones at the end of a line; else " + remedy
        yield number, BadRow(f"it has {len(row)} cells, but the header has {len(names)}", remedy)


def _without_nulls(value: Any) -> Any:
    """`value` without the keys of objects that are null: all objects of a parquet column have the
    same keys, so the arguments of one tool's call have those of all tools.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # not at the top: it takes half a second, and other files do not need it
    import pyarrow.parquet

    limit = max(MIN_LIMIT, MAX_EXPANSION * path.stat().st_size)
    size, number = 0, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                size += batch.nbytes
                for row in batch.to_pylist() if size <= limit else ():
                    size += len(str(row)) + ROW_OVERHEAD
                    number += 1
                    yield number, _without_nulls(row)
                if size > limit:
                    raise ValueError("its rows are far larger than the file")
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: also text that is not UTF-8
        reason = str(error).partition("\n")[0][:80]
        raise BadData(
            f"{path} is not a readable parquet file: {reason}", "download it or write it again"
        ) from None
