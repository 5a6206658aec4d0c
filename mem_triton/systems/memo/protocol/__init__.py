"""MeMo's inference protocol (arXiv 2605.15156, section 3) as a state machine without I/O.

``machine.start`` and ``machine.advance`` are pure: a state and an event give the next state and the calls to make. The
driver (``mem_triton.systems.memo.driver``) makes them; tests and traces feed events without any server.
"""
