"""The same operators under torch.distributed: one call of an operator on DTensors -> calls on the shards of each rank.

    when_imported   torch.distributed.tensor is imported  ->  `rules` register themselves
    rules           an operator's arguments, DTensors     ->  placements, a local call, DTensors
    layout          placements as they are                ->  the cheapest ones that are exact
    coordinates     a text over b, h, i                   ->  the text of a shard, which knows where it lies

Importing this package imports nothing of torch.distributed.
"""
