"""What is asked of a pipeline and a variant: likelihoods in, metrics out."""
