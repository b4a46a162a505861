"""What `gptkern check`, `bench` and `tune` and the files in bench/ measure with.

cells         what is measured, and the implementations that are compared
rooms         the cells of an operator, from its room's problem.py; model: those of the whole model, and what they count
peers         each other library, behind one small adapter, and which of them an operator is timed against
tolerance     the rule by which a result is right; checking: the kernels of this machine, by that rule
timing        device time, wall time, host time, peak memory
ceilings      what this device can do: copy bandwidth, matrix products
machine       which device, driver, versions and sources a number belongs to
runner        checks a cell, then times all of its implementations in turn
results       the JSON file
rates         what such a file says: rates, shares of the ceilings, who is ahead
report        Markdown from such a file; plots: its pictures
costs         what is no kernel: host time, import, first call
tuning        the choice of backends and of tiles by measurement; tuning_tasks: its shapes and candidates
"""
