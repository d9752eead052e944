"""Messages and service stubs of package hicache.v1, generated from protos/ by `make protos`."""
