"""Pure: a node's part in the job as a state machine. `engine.NodeEngine.step(event, now_s)` answers with effects.

No thread, lock, socket, clock or store is in here. `coordination` carries the effects out on threads and feeds the
answers back in; the simulator does the same under virtual time.
"""
