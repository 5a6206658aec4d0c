"""The demo on a real model: documents of one's own, and a conversation that outlives its server."""
