"""Reads a data set with Hugging Face's ``datasets`` and writes verl's parquet files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_troll.tasks.catalog import Row, Source, Task, UnusableRowError, WrongRowError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000
"""Rows held in memory and written together."""
LOADERS = {".parquet": "parquet", ".jsonl": "json"}


class TaskError(Exception):
    """An error that the user can fix; the message says how."""


@dataclass(frozen=True)
class Written:
    """One file.

    Attributes:
        rows: number of rows.
        left_out: number of source rows left out, by reason.
        firsts: where the first of these rows is, by reason, if something in it is wrong.
    """

    path: Path
    rows: int
    left_out: dict[str, int]
    firsts: dict[str, str] = field(default_factory=dict)


class Origin:
    """Says where a row of the source is.

    Args:
        files: what the rows were read from, in this order; None for the hub.
        total: number of rows.
    """

    def __init__(self, source: Source, files: list[Path] | None, total: int) -> None:
        self._source, self._files, self._total = source, files, total

    def of(self, number: int, column: str) -> str:
        """File, row in it from 1 on, and column of the row ``number``, from 1 on over all files."""
        if self._files is None:
            name = " ".join(filter(None, (self._source.hub, self._source.config)))
            return f"{name} on the hub, split {self._source.split}, row {number}, column {column}"
        counts = [_row_count(file) for file in self._files]
        where = ", ".join(map(str, self._files))
        if sum(counts) == self._total:
            index = next(index for index, end in enumerate(accumulate(counts)) if number <= end)
            where, number = str(self._files[index]), number - sum(counts[:index])
        return f"{where}, row {number}, column {column}"


def _row_count(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows)
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def local_files(path: Path, source: Source, split: str) -> list[Path]:
    """The files of one split in a folder, or the file itself.

    Raises:
        TaskError: there are none, or their format is not supported.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = []
        for pattern in source.names:
            found = sorted(path.rglob(pattern))
            files = [file for file in found if not set(file.relative_to(path).parts[:-1]) & set(source.avoid)]
            if files:
                break
        else:
            raise TaskError(f"--local {path}: no file for the split {split}; looked for {', '.join(source.names)}")
    else:
        raise TaskError(f"--local {path}: no such file or folder")
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= LOADERS.keys():
        raise TaskError(f"--local {path}: files end in {sorted(kinds)}; one of {sorted(LOADERS)} can be read")
    return files


def load(source: Source, split: str, local: Path | None) -> Dataset:
    """Load one split, unconverted.

    Raises:
        TaskError: it cannot be found, downloaded or read.
    """
    try:
        import datasets
    except ImportError as error:
        raise TaskError("the package datasets is missing: pip install 'verl_troll[tasks]'") from error
    try:
        if local is None:
            return datasets.load_dataset(source.hub, source.config, split=source.split)
        files = local_files(local, source, split)
        return datasets.load_dataset(LOADERS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    except TaskError:
        raise
    except Exception as error:
        # The library says only that an error occurred.
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        where = f"{source.hub} on the hub" if local is None else str(local)
        hint = "" if local else "; without a connection, fetch its files elsewhere and pass --local PATH"
        raise TaskError(f"cannot read {where}: {type(error).__name__}: {error}{hint}") from error


def check_columns(dataset: Dataset, task: Task, where: str) -> None:
    """Check that the source has the task's columns.

    Raises:
        TaskError: names the missing and the available columns.
    """
    found = set(dataset.column_names)
    missing = [" or ".join(names) for names in task.columns if not found & set(names)]
    if missing:
        raise TaskError(f"{where}: missing column {', '.join(missing)}; its columns are {sorted(found)}")


def rows(
    dataset: Dataset,
    task: Task,
    split: str,
    origin: Origin,
    left_out: Counter[str],
    firsts: dict[str, str],
    limit: int | None,
) -> Iterator[Row]:
    """verl's rows, numbered from 0 in source order; adds to ``left_out`` and ``firsts`` (:class:`Written`).

    Raises:
        TaskError: a row is not in the data set's format; names its file, row and column.
    """
    seen: set[str] = set()
    index = 0
    for number, source_row in enumerate(dataset, 1):
        if limit is not None and index >= limit:
            return
        try:
            row = task.convert(source_row)
        except UnusableRowError as reason:
            left_out[str(reason)] += 1
            if left_out[str(reason)] == 1:
                firsts[str(reason)] = origin.of(number, reason.column)
            continue
        except WrongRowError as error:
            raise TaskError(f"{origin.of(number, error.column)}: {error}") from error
        if row is None:
            left_out["of another ability"] += 1
            continue
        if task.unique:
            key = row["prompt"][-1]["content"]
            if key in seen:
                left_out["repeats a prompt"] += 1
                continue
            seen.add(key)
        row["extra_info"] = {"split": split, "index": index, **row["extra_info"]}
        index += 1
        yield row


def prepare(name: str, task: Task, split: str, out: Path, *, local: Path | None, limit: int | None) -> Written:
    """Write ``out/<split>.parquet``; an interrupted run leaves an older file unchanged.

    Args:
        name: name of the task.
        local: a file or folder in the data set's hub format; None loads from the hub.
        limit: maximum number of rows, None for all.

    Raises:
        TaskError: the source cannot be read, is not what the task expects, or has no usable row.
    """
    source = task.sources[split]
    dataset = load(source, split, local)
    check_columns(dataset, task, f"{name}, split {split}")
    origin = Origin(source, None if local is None else local_files(local, source, split), len(dataset))
    left_out: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    path, count = write(rows(dataset, task, split, origin, left_out, firsts, limit), split, out)
    if not count:
        places = "".join(f"; the first, {reason}: {place}" for reason, place in firsts.items())
        raise TaskError(f"{name}, split {split}: no row is left of {len(dataset)}; left out: {dict(left_out)}{places}")
    return Written(path, count, dict(left_out), firsts)


def write(rows: Iterable[Row], split: str, out: Path) -> tuple[Path, int]:
    """Write ``out/<split>.parquet`` and return its path and number of rows; without rows there is no file.

    An interrupted run leaves an older file unchanged.
    """
    import pyarrow
    from pyarrow import parquet

    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{split}.parquet"
    unfinished = out / f".{split}.parquet.{os.getpid()}"
    count = 0
    writer: Any = None
    try:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == BATCH:
                writer = _write(batch, writer, unfinished, pyarrow, parquet)
                batch = []
        if batch:
            writer = _write(batch, writer, unfinished, pyarrow, parquet)
        if writer:
            writer.close()
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path, count


def _write(batch: list[Row], writer: Any, path: Path, pyarrow: Any, parquet: Any) -> Any:
    table = pyarrow.Table.from_pylist(batch, schema=writer.schema if writer else None)
    writer = writer or parquet.ParquetWriter(path, table.schema)
    writer.write_table(table)
    return writer
