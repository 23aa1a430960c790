"""Training in JAX: a loop for any loss (`loop`), with adversarial and consistent training (`consistent`) on it."""
