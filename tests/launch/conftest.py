"""Runs of the tiny configuration, as the tests of `pretrain` start them."""

from tests.pretrain.conftest import launch, shards, tiny_toml, train

__all__ = ["launch", "shards", "tiny_toml", "train"]
