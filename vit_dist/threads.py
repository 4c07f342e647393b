"""How OpenMP threads wait for each other: not so long that they keep the cores of those that they wait for."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

SPINS = "1000"  # rounds before a thread sleeps; libgomp's own default is 300,000 (docs/decisions.md, 2026-12-01)


def spin_briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set GOMP_SPINCOUNT for this process and its children, unless it or OMP_WAIT_POLICY is set.

    For entry points, before PyTorch is imported: libgomp reads the variable when it is loaded.
    """
    if "torch" not in sys.modules and not environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environ["GOMP_SPINCOUNT"] = SPINS
