"""Context parallelism: attention whose queries, keys and values are cut along the sequence, one part on each rank.

order      which tokens a rank has
context    with context_parallel(...)  ->  the lowering that attention inside asks for
captured   captured tensors of a call ->  which are cut with the tokens, and which cannot be told
whole      a call on a rank's part     ->  what of it is no part, but the same on every rank
lowering   a call on a rank's part     ->  the rank's rows of the whole attention, by one of two ways:
gathering  keys and values travel; the lowering of this machine selects
counting   queries travel; each rank counts its own keys, and counts and sums are added up
"""
