"""Sweeps: a grid file becomes cells, cells become `python -m kvc` commands on slots of this machine or under SLURM."""
