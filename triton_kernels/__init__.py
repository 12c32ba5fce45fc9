"""Triton kernels and their launchers. Imports torch and triton only."""
