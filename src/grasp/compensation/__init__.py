"""Compensation: a short training after compression to bring back what was lost (paper, GRASP*)."""
