"""What measurement decides, as data: which tiles a kernel runs with, and which backend runs a call.

The data stand in the operators' rooms, what reads and writes them here:

    <room>/<backend>.json     tiles of a backend's kernels, by architecture and, where measured, by device
    <room>/backends.json      the order in which backends are tried, by architecture, and what was measured
    configurations.py         reads the former: `Table`, `override`
    orders.py                 reads the latter: `default`, `preferences`, `variants`
    user.py                   the file of a user who ran `gptkern tune`, one a device, in the user's cache folder
    files.py                  the layout of the files, their locks, and what is said of a file that is not right

For a device the user's own file counts before the measured entries that ship with gptkern for that very device, and
these before the defaults of its architecture. Nothing here is read when gptkern is imported: a kernel's table is read
with the kernel's module, the rest when the first call on a GPU chooses.
"""
