"""Page stores: where bytes live. Host memory (slots in sealed memfds) and disk (LMDB by page key).

Import the module you need; ``hicache.tier.host`` works without lmdb and zstandard installed.
"""
