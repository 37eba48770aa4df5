"""The running job: the stem's trace, then group after group of blocks is tuned.

There are two streams of hidden states: what the unquantized blocks give, and what the quantized ones give.
Both move past a group once it is tuned.
"""
