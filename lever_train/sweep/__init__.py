"""Grids of trainings, each cell judged once."""
