"""Converts each field of a sample to the bytes of a tar member and back."""

from __future__ import annotations

import io
import json
import math
import tokenize
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from infra import storage

# The file name of each field in the tar. The order is part of the format: equal samples give equal bytes.
SUFFIXES = {
    "caption": "caption.txt",
    "first": "first.png",
    "latents": "latents.npy",
    "logvar": "logvar.npy",
    "meta": "meta.json",
    "pixels": "pixels.npy",
    "text": "text.npy",
    "tokens": "tokens.npy",
}
OPTIONAL = ("logvar", "pixels", "text")
BY_FRAME = ("latents", "logvar", "pixels")  # arrays whose first axis is the frames
NPY_HEAD_BYTES = 128  # size of the header that `np.save` writes for an array of few axes


def encode_field(name: str, value: Any) -> bytes:
    """Returns the bytes of a field; equal values give equal bytes."""
    suffix = SUFFIXES[name].rsplit(".", 1)[1]
    if suffix == "txt":
        return value.encode()
    if suffix == "json":
        return storage.json_bytes(value)
    buffer = io.BytesIO()
    if suffix == "png":
        # A third of the default's time, 13 ms a clip at 256 pixels, for 11 % more of this one member.
        Image.fromarray(value).save(buffer, "PNG", compress_level=3)
    else:
        np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def decode_field(name: str, data: bytes) -> Any:
    """Returns a field from its bytes. Nothing is unpickled, and a header cannot make it allocate more than the bytes.

    Raises:
        ValueError: the bytes are not a valid field.
    """
    suffix = SUFFIXES[name].rsplit(".", 1)[1]
    if suffix == "txt":
        return data.decode()
    if suffix == "json":
        try:
            return json.loads(data)
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
    if suffix == "png":
        try:
            return np.array(Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"not a PNG ({error})") from error
    return _decode_npy(data)


@dataclass(frozen=True)
class Layout:
    """The layout of an array in its member: from byte `begin` on, `shape` values of `dtype` in C order."""

    begin: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one frame of an array whose first axis is the frames."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def npy_layout(head: bytes) -> Layout:
    """Returns the layout from the first bytes of a member. Raises ValueError if it is not an array of plain numbers."""
    buffer = io.BytesIO(head)
    if (version := np.lib.format.read_magic(buffer)) != (1, 0):
        raise ValueError(f"npy version {version}, expected (1, 0)")
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # errors that its parser does not convert
        raise ValueError(f"a damaged npy header ({error})") from error
    if dtype.hasobject or fortran_order:
        raise ValueError("an array of Python objects or in Fortran order")
    return Layout(buffer.tell(), shape, dtype)


def _decode_npy(data: bytes) -> np.ndarray:
    """`np.load` allocates the shape in a header before it reads the values; this function checks the size first."""
    layout = npy_layout(data)
    size_bytes = len(data) - layout.begin
    if math.prod(layout.shape) * layout.dtype.itemsize != size_bytes:
        raise ValueError(f"shape {layout.shape} of {layout.dtype} does not fit {size_bytes} bytes")
    return np.frombuffer(data, layout.dtype, offset=layout.begin).reshape(layout.shape).copy()
