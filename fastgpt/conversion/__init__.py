"""Checkpoints of nanoGPT, fastgpt and Hugging Face, each read into and written from one form: portable.Portable."""
