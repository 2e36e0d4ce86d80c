"""Benchmarks, run from a checkout: ``python -m bench``, or ``pytest bench/test_step.py`` for single steps."""
