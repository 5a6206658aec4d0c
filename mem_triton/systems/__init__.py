"""Memory systems, one package each: its front-end part and its worker part."""
