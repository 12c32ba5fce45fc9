"""`permattn report`: what a config does to one prompt, head by head."""
