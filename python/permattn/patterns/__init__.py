"""Patterns decide: one system, one file (or folder); each returns an AttnPlan."""
