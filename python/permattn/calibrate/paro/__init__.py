"""PAROAttention's offline part: the order a head reads tokens in, and the blocks it keeps."""

from permattn.calibrate.paro.check import HeadMap, PlanCheck, check_plan
from permattn.calibrate.paro.measure import Measurement, Seen, Subject, measure_runs
from permattn.calibrate.paro.options import MeasureOptions, SelectOptions
from permattn.calibrate.paro.pipelines import calibrate, measure
from permattn.calibrate.paro.select import forced_blocks, free_density

__all__ = [
    "HeadMap",
    "MeasureOptions",
    "Measurement",
    "PlanCheck",
    "Seen",
    "SelectOptions",
    "Subject",
    "calibrate",
    "check_plan",
    "forced_blocks",
    "free_density",
    "measure",
    "measure_runs",
]
