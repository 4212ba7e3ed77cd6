"""Reinforcement learning inside DMD: each method turns rewards into a gradient on x0 or a loss of the generator."""
