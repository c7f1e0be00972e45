"""Pure: who is in the next round and on which mesh, and what follows from failures.

Records and the round are plain data; `membership.decide` is the state machine over them. No torch, no sockets.
"""
