"""Network dissection: which units detect which concepts, and what attacks do to them.

    d = dissect.dissect(network, params, "features.28", data)
    found = dissect.best(dissect.iou(d.tally, data.concepts.category), data.concepts.category, C)

The parts can be used alone: `thresholds` (exact quantiles of activations), `tally` (how often units and concepts occur
together), `iou`, `best`, `counts` (concept detectors).
"""

from . import masking, moments, sensitivity
from .counting import FORMS, UNIONS, Tally, tally
from .detectors import CONVENTIONS, MINIMUM, Best, best, counts, iou
from .dissection import Dissection, Plan, dissect, feature_shapes, plan
from .quantiles import QUANTILE, thresholds

__all__ = [
    "CONVENTIONS",
    "FORMS",
    "MINIMUM",
    "QUANTILE",
    "UNIONS",
    "Best",
    "Dissection",
    "Plan",
    "Tally",
    "best",
    "counts",
    "dissect",
    "feature_shapes",
    "iou",
    "masking",
    "moments",
    "plan",
    "sensitivity",
    "tally",
    "thresholds",
]
