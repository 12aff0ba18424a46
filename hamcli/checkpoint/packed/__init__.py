"""The packed form of a checkpoint: smaller files, bit for bit the same weights.

planes   a block of elements <-> mask and planes of bytes, in numpy
blocks   planes <-> the bytes of a block, each plane by the codec that fits
native   the planes by the C++ extension
"""
