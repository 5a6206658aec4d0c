"""Training of a δ-mem adapter on conversations: what ``mem-triton train delta`` runs."""
