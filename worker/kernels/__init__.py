"""Attention kernels.

metadata.py   which tokens attend to which blocks, made once a step
bias.py       biases by distance, as part of the masks
reference.py  the definition, slow and obvious: the oracle of the tests
sdpa.py       gather the blocks, then torch's scaled dot product attention: any device
eager.py      attention written out, for scores with a soft cap or sinks
cpu/          our own, compiled, for CPUs
"""
