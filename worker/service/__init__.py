"""Asyncio around the engine, on rank 0 only. Knows Redis, not tensors.

worker.py     one worker process from start to end
loop.py       the story: plan, step, advance, commit, publish
intake.py     queue entries become sequences
output.py     sampled tokens become text, finish reasons and frames
publisher.py  frames go to the journals, fenced
lease.py      heartbeat, and the reaper of dead workers' requests
outage.py     one line when something fails again and again, and one when it is over
orphans.py    the end of requests that nobody reads
spans.py      the worker's part of a request's trace
"""
