"""From folders of shards to the batches of a step; batches.py first."""
