"""The demo: a real video through a vision-language model, dense and sparse, and why it works."""
