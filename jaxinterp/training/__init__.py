"""Training in JAX: a loop for any loss (`loop`); generated pictures (`generated`) and their detectors (`detectors`)."""
