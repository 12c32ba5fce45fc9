"""The demo: a real video through a vision-language model, dense and sparse, with a picture of why."""
