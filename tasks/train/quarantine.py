"""Records samples that are skipped because they are damaged, and fails once there are too many."""

from __future__ import annotations

from infra import storage
from infra.redaction import redact
from tasks.records import UserError

MOST_DAMAGED = 0.001  # share of the training samples


class Quarantine:
    """The damaged samples that all ranks have read, each once, also after a resume.

    Args:
        uri: folder of one file per sample, `<sample key>.json`; created with the first one.
        samples: number of samples of the training.

    Attributes:
        count: samples recorded by all ranks when this rank last listed the folder.
    """

    def __init__(self, uri: str, samples: int) -> None:
        self.uri = uri
        self._samples = samples
        self._recorded: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Counts the recorded samples again: another rank may have added some."""
        self.count = len(storage.list_dir(self.uri))

    def add(self, key: str, dataset: str, reason: str) -> None:
        """Records a damaged sample.

        Raises:
            UserError: too many samples are damaged.
        """
        if key in self._recorded:
            return
        storage.write_json(
            storage.join(self.uri, f"{key}.json"), {"key": key, "dataset": redact(dataset), "reason": reason}
        )
        self._recorded.add(key)
        self.refresh()
        if self.count > MOST_DAMAGED * self._samples:
            raise UserError(
                f"{self.count} of the {self._samples} samples trained on are damaged (last {key}, {reason}), more than"
                f" the limit of {MOST_DAMAGED:.1%}; verify {dataset}, repair it and delete {self.uri}"
            )
