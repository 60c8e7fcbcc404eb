"""The optimizer's state on the host, and an update that streams it through the accelerator or shares it with the CPU.

`layout` cuts the state into pieces, `program` orders an update's operations on lanes, `races` proves the order, `backends` run
it, `simulate` predicts how long it takes, `update` holds the tensors, and `zero3` puts it in the place of DeepSpeed's own loop.
"""
