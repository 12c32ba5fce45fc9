"""The bench: cases as data, a correctness gate, quiet timing, documents made from results."""
