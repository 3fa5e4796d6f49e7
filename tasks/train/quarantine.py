"""The books on damaged samples that a training leaves out: a file each, and a ceiling on how many there may be."""

from __future__ import annotations

from infra import storage
from infra.redaction import redact
from tasks.records import UserError

MOST_DAMAGED = 0.001  # of the samples that are trained on


class Quarantine:
    """The damaged samples that any rank of a training has met, each once, also after a resume.

    Args:
        uri: the folder of the books; it is there with the first entry, `<sample key>.json`.
        samples: how many samples the training has.
    """

    def __init__(self, uri: str, samples: int) -> None:
        self.uri = uri
        self._samples = samples
        self._entered: set[str] = set()

    def __len__(self) -> int:
        return len(storage.list_dir(self.uri))

    def add(self, key: str, dataset: str, reason: str) -> None:
        """Enters a damaged sample.

        Raises:
            UserError: more of the samples are damaged than may be left out.
        """
        if key in self._entered:
            return
        storage.write_json(
            storage.join(self.uri, f"{key}.json"), {"key": key, "dataset": redact(dataset), "reason": reason}
        )
        self._entered.add(key)
        if (damaged := len(self)) > MOST_DAMAGED * self._samples:
            raise UserError(
                f"{damaged} of the {self._samples} samples trained on are damaged (last {key}, {reason}), more than can"
                f" be left out ({MOST_DAMAGED:.1%}); verify {dataset}, repair it and delete {self.uri}"
            )
