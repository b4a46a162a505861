"""What `gptkern bench` and the files in bench/ measure with.

cells         what is measured, and the implementations that are compared
operators/    for each operator: its cells, inputs, implementations and reference
peers         the other libraries, each behind one small adapter
conventions   bytes and operations of each operator
timing        device time, wall time, host time, peak memory
ceilings      what this device can do: copy bandwidth, matrix products
machine       which device, driver, versions and sources a number belongs to
runner        checks a cell, then times all of its implementations in turn
results       the JSON file
rates         what such a file says: rates, shares of the ceilings, who is ahead
report        Markdown from such a file; plots: its pictures; provenance, wording: parts of the report
costs         what is no kernel: host time, import, first call, build, wheel
tuning        the choice of backends and of tiles by measurement; tuning_tasks: its shapes and candidates
"""
