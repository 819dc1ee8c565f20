"""Which classes the validation images say anything about."""

from collections.abc import Sequence

import numpy as np

from care_compress.data.samples import Samples
from care_compress.findings import Finding


def coverage_finding(samples: Samples, indices: Sequence[int]) -> Finding:
    """The classes that none of these images belongs to."""
    counts = np.bincount(samples.labels[list(indices)], minlength=len(samples.classes))
    empty = np.flatnonzero(counts == 0)
    check, total = "classes", f"{len(samples.classes):,} classes"
    if not len(empty):
        return Finding(
            check, "fine", f"each of {total} has at least {counts.min():,} validation images"
        )
    text = f"{len(empty):,} of {total} have no validation image: the accuracy does not know them"
    return Finding(check, "warning", text, tuple(samples.classes[label] for label in empty))
