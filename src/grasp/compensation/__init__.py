"""Compensation: a short training after compression that brings back what was lost (paper, GRASP*)."""
