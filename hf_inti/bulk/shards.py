"""The output of a bulk run: Parquet shards that are whole or not there, and what they already hold."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout


SETTINGS = b"hf_inti"  # the key in a shard's metadata
PART = ".{}.part"  # the name of a shard that is not whole; what reads the folder skips those with a dot


class Shards:
    """A folder of shards, for one run at a time: `with Shards(...) as shards: ... shards.add(table)`.

    Attributes:
        done: id -> error (None: none) of every clip in the shards.

    Args:
        folder: is made where it is missing.
        schema: of the tables.
        settings: what all shards must have in common, such as the model: text for text.
        rows: a shard is written when it has as many; `flush` writes one earlier.

    Raises ValueError if another run writes there, for shards of other settings, and for one that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike, schema: pa.Schema, settings: dict[str, str], rows: int):
        self.folder, self.rows, self.waiting, self.done = Path(folder), rows, [], {}
        self.schema = schema.with_metadata({SETTINGS: json.dumps(settings)})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")  # the system releases it when the process dies

    def __enter__(self) -> Self:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            message = f"output_dir must have one run at a time, got another in {self.folder}; wait for it or end it."
            raise ValueError(message) from None
        try:
            for part in self.folder.glob(PART.format("*.parquet")):  # of a run that was killed
                part.unlink()
            for path in self._paths():
                self.done |= self._read(path)
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.flush()
        finally:
            self.lock.release()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _read(self, path: Path) -> dict[str, str | None]:
        try:
            with pq.ParquetFile(path) as file:
                found = json.loads((file.schema_arrow.metadata or {}).get(SETTINGS, b"{}"))
                table = file.read(["video", "error"]) if found else None
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} must be a whole shard, got: {' '.join(str(error).split())[:200]}; delete it, and its clips "
                "are computed again."
            ) from None
        settings = json.loads(self.schema.metadata[SETTINGS])
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the shards in output_dir must have been written with {name} {settings[name]}, got "
                f"{found.get(name)} in {path}; choose another output_dir."
            )
        return dict(zip(table["video"].to_pylist(), table["error"].to_pylist(), strict=True))

    def add(self, table: pa.Table) -> None:
        """Add rows of the schema. Those that are there already are left out."""
        new = [video not in self.done for video in table["video"].to_pylist()]
        table = table.filter(pa.array(new, pa.bool_())).cast(self.schema)
        self.done |= dict(zip(table["video"].to_pylist(), table["error"].to_pylist(), strict=True))
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= self.rows:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard."""
        if self.waiting:
            own = [re.fullmatch(r"shard_(\d+)", path.stem) for path in self._paths()]  # others were renamed
            number = max((int(match[1]) + 1 for match in own if match), default=0)
            path = self.folder / f"shard_{number:06d}.parquet"
            self._write(pa.concat_tables(self.waiting), path)
            self.waiting.clear()

    def _write(self, table: pa.Table, path: Path) -> None:
        part = path.with_name(PART.format(path.name))
        with open(part, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def forget_broken(self, videos: Collection[str]) -> None:
        """Take the rows of those of these videos that are broken out of the shards, to try them again."""
        broken = {video for video in videos if self.done.get(video) is not None}
        for path in self._paths():
            table = pq.read_table(path)
            kept = table.filter(pa.array([video not in broken for video in table["video"].to_pylist()], pa.bool_()))
            if not len(kept):
                path.unlink()
            elif len(kept) < len(table):
                self._write(kept, path)
        for video in broken:
            del self.done[video]
