"""The paper's claims put to the test on a task: ``python -m dmdr_fast.eval.claims``."""
