"""What a model needs and costs, from its config and a machine's figures alone. Imports no torch, runs no model.

`anatomy` takes a config apart, `work` counts multiply-adds and bytes of a step, `compare` and `variants` explain why
one model is cheaper than another, `machines` and `serving` turn work into seconds, `prices` seconds and tokens into
money, `plan` answers `tenfold plan`.
"""

from __future__ import annotations

from tenfold.planner.anatomy import Anatomy, dissect
from tenfold.planner.work import Peaks, Work, roofline_seconds, step_work

__all__ = ["Anatomy", "Peaks", "Work", "dissect", "roofline_seconds", "step_work"]
