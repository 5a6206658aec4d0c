"""``python -m benchmarks.memo``: a memory model beside the model, on one server."""

from benchmarks.memo.app import main

main()
