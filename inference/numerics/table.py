"""Codes of many texts as one Parquet table: a row for every feature that fires on a token. No torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inference.numerics.infer import Codes

SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.int64(), metadata={"what": "number of the text, from 0"}),
        pa.field("sae", pa.int64(), metadata={"what": "id of the SAE"}),
        pa.field("position", pa.int32(), metadata={"what": "place of the token in the text as the model saw it"}),
        pa.field("token_id", pa.int32()),
        pa.field("token", pa.string()),
        pa.field("special", pa.bool_(), metadata={"what": "a control token such as BOS"}),
        pa.field("feature", pa.int32()),
        pa.field("value", pa.float32(), metadata={"what": "the feature's code"}),
    ]
)
GROUP_ROWS = 1 << 20


class Table:
    """An open table; `rows` counts what was written. Held in memory: less than a group and one text."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0
        self.rows = 0

    def add(self, prompt: int, sae: int, ids: Sequence[int], tokens: Sequence[str], special: Sequence[bool], codes: Codes) -> None:  # fmt: skip
        """All codes of one SAE on one text."""
        position = np.repeat(np.arange(len(ids), dtype=np.int32), np.diff(codes.start))
        n = len(position)
        whose = pa.array(position)
        self._waiting.append(
            pa.table(
                [
                    pa.array(np.full(n, prompt, np.int64)),
                    pa.array(np.full(n, sae, np.int64)),
                    whose,
                    pa.array(np.asarray(ids, np.int32)).take(whose),
                    pa.array(list(tokens), pa.string()).take(whose),
                    pa.array(list(special), pa.bool_()).take(whose),
                    pa.array(codes.features),
                    pa.array(codes.values),
                ],
                schema=SCHEMA,
            )
        )
        self._n_waiting += n
        self.rows += n
        if self._n_waiting >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._n_waiting = [], 0


@contextmanager
def new_table(path: Path) -> Iterator[Table]:
    """A table written group by group. The caller puts it in place when the block ended well."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=["token", "sae", "prompt"]) as writer:
        table = Table(writer)
        yield table
        table.flush()
