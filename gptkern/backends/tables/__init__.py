"""What measurement decides, as data: which tiles a kernel runs with, and which backend runs a call.

For a device the file of a user who ran `gptkern tune` counts before the measured entries that ship with gptkern for
that very device, and these before the defaults of its architecture. Nothing here is read when gptkern is imported: a
kernel's table is read with the kernel's module, the rest when the first call on a GPU chooses.
"""
