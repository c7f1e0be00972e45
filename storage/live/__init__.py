"""The live state: what a rank holds after its last complete step, staged when a peer is lost and not before."""
