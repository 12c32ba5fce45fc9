"""`permattn train-biformer`: a small BiFormer trained from scratch, three ways, side by side."""
