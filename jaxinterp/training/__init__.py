"""Training in JAX: a loop for any loss (`loop`), sets of generated pictures (`generated`), their detectors (`detectors`)."""
