"""Pages of keys and values on a device: their layout, who holds them, how they are filled, what a step sees."""
