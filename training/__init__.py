"""Data sets to checkpoints; `unperturb train` lists the methods."""
