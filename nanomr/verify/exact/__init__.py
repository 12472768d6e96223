"""Solvers that decide one margin: trees, linear programs with hulls, the MILP; and the input box in parts."""
