"""Solvers that decide one rival exactly: trees, linear programs with hulls, the MILP."""
