"""The job from segmented images to a page of units: network dissection in a results directory that resumes."""

from .estimate import estimate
from .job import Dissected, Job, dissect, prepare
from .released import Released, read_released

__all__ = ["Dissected", "Job", "Released", "dissect", "estimate", "prepare", "read_released"]
