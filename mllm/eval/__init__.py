"""Evaluation: the lmms-eval model and tasks, sweeps, statistics, bench and report."""
