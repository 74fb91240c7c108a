"""What connects the processes of one worker.

group.py  rank, size and the collectives of the layers
"""
