"""Folders in Broden's format, built from pictures (`make`) and checked (`check`). `data.Broden` reads them."""

from .check import Checked, check
from .make import Made, make

__all__ = ["Checked", "Made", "check", "make"]
