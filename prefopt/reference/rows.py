"""A row of the store as bytes: an array of numbers with its form, and a checksum that says where it belongs.

The checksum covers the entry's key, the row's id, its type and shape, and its bytes. So a flipped bit shows, and so do
two rows that changed places and a row that came from the file of another model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

# Little-endian on every machine. bfloat16, which numpy lacks, travels as the unsigned integers that share its bits.
_FORMS = ("<f2", "<f4", "<f8", "<u2", "<i4")
_EXPONENT = 0x7F80  # of bfloat16; all ones for infinity and NaN

ID_BYTES = 32

Row = tuple[bytes, bytes, bytes, bytes]  # id, form, data, checksum


def encode(key: str, id: bytes, values: np.ndarray) -> Row:
    """The columns of a row. Raises `ValueError` for a wrong id or type, and for values that are not finite."""
    if len(id) != ID_BYTES:
        raise ValueError(f"the id of a row has {ID_BYTES} bytes, not {len(id)}")
    stored = values.dtype.newbyteorder("<")
    if stored.str not in _FORMS:
        raise ValueError(f"row {id.hex()[:12]}: {values.dtype} is not kept; the types are {', '.join(_FORMS)}")
    if not is_finite(values):
        raise ValueError(f"row {id.hex()[:12]}: NaN or infinity is never kept")
    form = " ".join([stored.str, *map(str, values.shape)]).encode()
    data = values.astype(stored, copy=False).tobytes()
    return id, form, data, _checksum(key, id, form, data)


def decode(key: str, id: Any, form: Any, data: Any, checksum: Any) -> np.ndarray | None:
    """The values of a row as it was read from a file; None when anything in it is not as it was written."""
    # A flipped bit can turn a column into a number, a text or nothing.
    if not all(isinstance(part, bytes) for part in (id, form, data)) or checksum != _checksum(key, id, form, data):
        return None
    dtype, *shape = form.decode().split(" ")
    return np.frombuffer(data, dtype).reshape([int(size) for size in shape]).copy()


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; unsigned integers are taken for the bits of bfloat16."""
    if values.dtype.kind == "u":
        return not np.any(values & _EXPONENT == _EXPONENT)
    return bool(np.isfinite(values).all())


def _checksum(key: str, id: bytes, form: bytes, data: bytes) -> bytes:
    # The id has a fixed length and the form no line break, so no two rows feed the hash with the same bytes. Against
    # damage, not against forgery: rows of hidden states are read at every step, so it has to be fast.
    digest = xxhash.xxh3_128(key.encode())
    for part in (b"\n", id, form, b"\n", data):
        digest.update(part)
    return digest.digest()
