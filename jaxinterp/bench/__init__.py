"""Benchmarks: `jaxinterp bench`. Timing, peaks of devices, rooflines, records; a module for each subject."""
