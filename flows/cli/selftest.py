"""The command `selftest`: compares the given feature extractors with published values."""

from __future__ import annotations

from tasks.metrics import selftest as test
from tasks.metrics.extractors.files import ExtractorFiles

NONE = ExtractorFiles()
_VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def selftest(*, extractors: ExtractorFiles = NONE) -> int:
    """Compare feature extractors with published values, one line each; the exit code is 1 if one differs.

    Args:
        extractors: the files to test.
    """
    import torch

    failed = False
    for finding in test.selftest(extractors, "cuda" if torch.cuda.is_available() else "cpu"):
        print(f"selftest    {_VERDICTS[finding.passed]:<8}{finding.metric}: {finding.text}", flush=True)
        failed |= finding.passed is False
    return int(failed)
