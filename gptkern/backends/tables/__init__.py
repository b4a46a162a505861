"""What measurement decides, as data: which tiles a kernel runs with, and which backend runs a call.

    <operator>.json        configurations of its Triton kernels, by architecture and, where measured, by device
    backends.json          the order in which backends are tried, and where a measurement says another one
    configurations.py      reads the former: `Table`, `override`
    backends.py            reads the latter: `preferences`
    shape_classes.py       the classes of calls that backends.json tells apart
    user.py                the file of a user who ran `gptkern tune`, one a device, in the user's cache folder
    files.py               the layout of the files, and what is said of a file that is not right

For a device the user's own file counts before the measured entries that ship with gptkern for that very device, and
these before the defaults of its architecture. Nothing here is read when gptkern is imported: a kernel's table is read
with the kernel's module, the rest when the first call on a GPU chooses.
"""
