"""The search for a good recipe: by experience, by experiment, by learning, in a study that can be killed at any moment.

space.py        what is varied: keys of a recipe, and their values
study.py        the study's SQLite file: what was begun, and its trials
halving.py      which trials go on (successive halving), and how many a budget buys
sampling.py     Optuna's samplers and pruners, asked for one trial at a time
planning.py     what is to be trained next
trials.py       one trial, or the part of it until its next rung
working.py      a worker, from trial to trial, until the budget is spent
"""
