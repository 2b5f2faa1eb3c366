"""Data sets to checkpoints; `python -m training` lists the methods."""
