"""`permattn calibrate`: offline searches, their tables and pictures."""
