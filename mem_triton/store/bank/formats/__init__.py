"""Keys and values that others have trained: the files of peft and of HazyResearch's cartridges, read and written."""
