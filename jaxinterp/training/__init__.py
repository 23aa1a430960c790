"""Training in JAX: sets of real and generated pictures (`generated`), and detectors that tell them apart (`detectors`)."""
