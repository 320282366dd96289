"""Text and token batches for calibration and evaluation. Nothing here runs a model.

batches: rows of token ids in micro-batches, with content keys
calibration: calibration sets, which are prompts as token batches
code: files of program code
corpora: parallel corpora, and which lines are held out
demonstrations: lines of a corpus formatted as prompts
heldout: held-out lines as token rows
lossless: whether a tokenizer keeps the characters of a text
questions: questions with labels, for XNLI and reviews
readers: readers of text files, tables, JSON lines and Hugging Face datasets
special_tokens: the special tokens that rows need, with fallbacks
sample/: the corpus that ships with mlprune
"""
