"""From images to verdicts: attack, bounds, solvers in turn, and the records of a run."""
