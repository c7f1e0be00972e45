"""The store in an etcd v3 cluster. gRPC comes in with `client` only, so importing this costs nothing."""
