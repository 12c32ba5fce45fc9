"""The demo of PAROAttention: a video denoised dense and sparse by a constructed Wan transformer."""
