"""Reinforcement learning inside DMD: each method turns rewards into a gradient on the generator's output."""
