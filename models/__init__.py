"""Computations on image tensors: classifiers, views, contrastive losses, purifiers, checkpoints."""
