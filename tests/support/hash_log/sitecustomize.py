"""Python imports this at its start where the folder is on PYTHONPATH: it logs each file that is hashed."""

import hashlib
import os
from typing import Any

file_digest, log_file = hashlib.file_digest, os.environ["TRIP_HASH_LOG"]


def recorded(fileobj: Any, digest: Any, /, **options: Any) -> Any:
    with open(log_file, "a") as log:
        log.write(f"{fileobj.name}\n")
    return file_digest(fileobj, digest, **options)


hashlib.file_digest = recorded
