"""The Hub: what is sent of a run, how it is sent, and how a training never suffers from it."""
