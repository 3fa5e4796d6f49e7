"""The command `selftest`: compares the feature extractors with published values."""

from __future__ import annotations

from tasks.metrics import selftest as test
from tasks.metrics.extractors.files import JudgeFiles

NONE = JudgeFiles()
_VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def selftest(*, judges: JudgeFiles = NONE) -> int:
    """Compare the feature extractors' files with published values, one line each; exit code 1 if one differs.

    Args:
        judges: the files to test.
    """
    import torch

    failed = False
    for finding in test.selftest(judges, "cuda" if torch.cuda.is_available() else "cpu"):
        print(f"selftest    {_VERDICTS[finding.passed]:<8}{finding.metric}: {finding.text}", flush=True)
        failed |= finding.passed is False
    return int(failed)
