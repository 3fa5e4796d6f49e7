"""How each field of a sample becomes the bytes of a tar's member and back."""

from __future__ import annotations

import io
import json
import math
import tokenize
from typing import Any

import numpy as np
from PIL import Image

from infra import storage

# Where each field lies in the tar. The order is part of the format: equal samples give equal bytes.
SUFFIXES = {
    "caption": "caption.txt",
    "first": "first.png",
    "latents": "latents.npy",
    "meta": "meta.json",
    "pixels": "pixels.npy",
    "tokens": "tokens.npy",
}


def encode_field(name: str, value: Any) -> bytes:
    """The bytes of a field; equal values give equal bytes."""
    suffix = SUFFIXES[name].rsplit(".", 1)[1]
    if suffix == "txt":
        return value.encode()
    if suffix == "json":
        return storage.json_bytes(value)
    buffer = io.BytesIO()
    if suffix == "png":
        Image.fromarray(value).save(buffer, "PNG")
    else:
        np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def decode_field(name: str, data: bytes) -> Any:
    """A field from its bytes; nothing is unpickled, and no header makes it take more memory than the bytes hold.

    Raises:
        ValueError: bytes that are not the field's.
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


def _decode_npy(data: bytes) -> np.ndarray:
    """`np.load` believes a header's shape before it has seen the values; this does not."""
    buffer = io.BytesIO(data)
    if (version := np.lib.format.read_magic(buffer)) != (1, 0):
        raise ValueError(f"npy version {version}, expected (1, 0)")
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # what its parser lets through
        raise ValueError(f"a damaged npy header ({error})") from error
    if dtype.hasobject or fortran_order:
        raise ValueError("an array of Python objects or in Fortran order")
    if math.prod(shape) * dtype.itemsize != len(data) - buffer.tell():
        raise ValueError(f"shape {shape} of {dtype} does not fit {len(data) - buffer.tell()} bytes")
    return np.frombuffer(data, dtype, offset=buffer.tell()).reshape(shape).copy()
