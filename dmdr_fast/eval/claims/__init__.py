"""The paper's claims put to the test on the digits task: ``python -m dmdr_fast.eval.claims``."""
