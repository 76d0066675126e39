"""Models that select keys by themselves: a selection that is k-NN attention becomes a softmax with an own k."""
