"""Everything that only a GPU can show, in one command of at most 570 s: ``make gpu-check``."""
