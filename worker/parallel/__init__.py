"""What connects the processes of one worker.

group.py           rank, size and the collectives of the layers
launch.py          starts a process for each shard, ends all when one is lost, and starts again
wiring.py          what the launcher lays out for them, and each one's end of it
beats.py           signs of life, for the launcher to watch
plan_codec.py      plans as bytes
plan_ring.py       plans to the other shards of a machine
plan_broadcast.py  plans to shards on other machines
doorbell.py        wakes a sleeping process
shared_memory.py   memory without a name
"""
