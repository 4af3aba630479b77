"""Data: KuaiRand archives and synthetic users in, per-user sequences and a request timeline out."""
