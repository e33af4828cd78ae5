"""The paper's numbers, recomputed: tables.py, containment.py, hybrids.py.

A package, since `experiments.paper` would otherwise be the command paper.py beside this folder.
"""
