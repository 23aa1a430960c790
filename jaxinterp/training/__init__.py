"""Training in JAX: a loop for any loss (`loop`), consistent training (`consistent`), detectors of generated pictures."""
