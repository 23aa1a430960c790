"""Training in JAX: a loop for any loss, consistent training on it (`consistent`), detectors of generated pictures."""
