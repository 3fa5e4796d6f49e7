"""The peers of the training loader, each used as in its documentation; imports nothing of this project.

    python benchmarks/loader_peers.py convert TARS FOLDER --peer litdata
    python benchmarks/loader_peers.py speed TARS FOLDER --peer litdata --shuffle --epochs 3
    python benchmarks/loader_peers.py resume TARS FOLDER --peer litdata --workers 1 --then 2 --stop 20

Each prints one line of JSON. `benchmarks/loader.py` calls it. The first token of a sample is its number.
"""

from __future__ import annotations

import argparse
import collections
import glob
import io
import json
import os
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

BATCH = 32
SHAPE, LENGTH = (16, 4, 32, 32), 77


def samples(tars: str) -> Iterator[dict[str, Any]]:
    """The samples of the tars in their order: latents fp16, tokens int32, caption."""
    for path in sorted(glob.glob(f"{tars}/*.tar")):
        with tarfile.open(path) as tar:
            read = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dict.fromkeys(name.split(".", 1)[0] for name in read):
            arrays = {n: np.load(io.BytesIO(read[f"{key}.{n}.npy"])) for n in ("latents", "tokens")}
            yield {**arrays, "caption": read[f"{key}.caption.txt"].decode()}


def as_tensors(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) if name != "caption" else value for name, value in sample.items()}


def convert(peer: str, tars: str, folder: str) -> None:
    """Writes the samples in the peer's own format, chunks of 64 MiB."""
    if peer == "litdata":
        import litdata

        numbered = [as_tensors(sample) for sample in samples(tars)]
        litdata.optimize(numbered.__getitem__, list(range(len(numbered))), folder, chunk_bytes="64MB", num_workers=1)
    else:
        from streaming import MDSWriter

        columns = {"latents": "ndarray:float16:16,4,32,32", "tokens": f"ndarray:int32:{LENGTH}", "caption": "str"}
        with MDSWriter(out=folder, columns=columns, size_limit=1 << 26) as writer:
            for sample in samples(tars):
                writer.write(sample)


def litdata(folder: str, shuffle: bool, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    return StreamingDataLoader(StreamingDataset(folder, shuffle=shuffle), batch_size=BATCH, num_workers=workers)


def mosaicml(folder: str, shuffle: bool, workers: int) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(local=folder, batch_size=BATCH, shuffle=shuffle)
    return StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)


class WebDatasetBatches:
    """`WebDataset(...).decode()` in the order of the tars, or its raw bytes viewed as arrays where `decode` is off."""

    def __init__(self, tars: str, decode: bool) -> None:
        import webdataset

        data = webdataset.WebDataset(sorted(glob.glob(f"{tars}/*.tar")), shardshuffle=False)
        self._data = data.decode() if decode else data.map(viewed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batch: list[dict[str, Any]] = []
        for sample in self._data:
            batch.append(sample)
            if len(batch) == BATCH:
                yield {n: torch.from_numpy(np.stack([one[f"{n}.npy"] for one in batch])) for n in ("latents", "tokens")}
                batch = []


def viewed(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a raw sample from their known shapes, without reading a header."""
    latents = np.frombuffer(sample["latents.npy"], np.float16, offset=128).reshape(SHAPE)
    return {"latents.npy": latents, "tokens.npy": np.frombuffer(sample["tokens.npy"], np.int32, offset=128)}


def loader(peer: str, tars: str, folder: str, shuffle: bool, workers: int) -> Iterable[dict[str, torch.Tensor]]:
    if peer.startswith("webdataset"):
        return WebDatasetBatches(tars, peer == "webdataset")
    return {"litdata": litdata, "mosaicml": mosaicml}[peer](folder, shuffle, workers)


def numbers(batches: Iterable[dict[str, torch.Tensor]], most: int | None = None) -> list[int]:
    """Returns the numbers of the samples in the first batches; checks their shapes and types."""
    found: list[int] = []
    for count, batch in enumerate(batches, 1):
        latents, tokens = batch["latents"], batch["tokens"]
        assert latents.shape[1:] == SHAPE and latents.dtype == torch.float16 and tokens.shape[1:] == (LENGTH,)
        found += tokens[:, 0].tolist()
        if count == most:
            break
    return found


def speed(batches: Iterable[Any], epochs: int) -> dict[str, Any]:
    """Returns samples per second of each epoch, after a warm-up epoch that must contain every sample."""
    count = len(set(numbers(batches)))
    rates = []
    for _ in range(epochs):
        started = time.perf_counter()
        seen = sum(len(batch["latents"]) for batch in batches)
        rates.append(round(seen / (time.perf_counter() - started)))
    return {"distinct_samples": count, "samples_per_second": rates}


def resume(given: argparse.Namespace) -> dict[str, Any]:
    """Counts the samples of an epoch that are repeated or lost when it is stopped in the middle and resumed."""

    def in_child(work: Any) -> Any:
        """Runs `work` in a new process, so that only the state remains of the stopped one."""
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                json.dump(work(), file)
                file.flush()
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("a part of the epoch failed")
            file.seek(0)
            return json.load(file)

    def stopped() -> Any:
        batches: Any = loader(given.peer, given.tars, given.folder, True, given.workers)
        seen = numbers(batches, given.stop)
        return [seen, batches.state_dict() if hasattr(batches, "state_dict") else None]

    def continued() -> Any:
        batches: Any = loader(given.peer, given.tars, given.folder, True, given.then)
        if state is not None:
            batches.load_state_dict(state)
        return numbers(batches)

    whole = in_child(lambda: numbers(loader(given.peer, given.tars, given.folder, True, given.workers)))
    seen, state = in_child(stopped)
    seen += in_child(continued)
    times = collections.Counter(seen)
    return {
        "workers": [given.workers, given.then],
        "repeated": sum(count - 1 for count in times.values()),
        "lost": len(set(whole) - set(seen)),
        "same_order": seen == whole,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("convert", "speed", "resume"))
    parser.add_argument("tars")
    parser.add_argument("folder")
    parser.add_argument("--peer", choices=("litdata", "mosaicml", "webdataset", "webdataset-raw"), required=True)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--then", type=int, default=1)
    parser.add_argument("--stop", type=int, default=10, help="batches after which the epoch is stopped")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if chosen.what == "convert":
        convert(chosen.peer, chosen.tars, chosen.folder)
    elif chosen.what == "resume":
        print(json.dumps(resume(chosen)))
    else:
        batches = loader(chosen.peer, chosen.tars, chosen.folder, chosen.shuffle, 0)
        print(json.dumps(speed(batches, chosen.epochs)))
