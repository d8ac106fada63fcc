"""From text to tokens to batches.

``corpora`` finds documents, in files (``readers``) and in Hugging Face datasets (``hub``). ``tokenizer`` turns them into
ids, and ``encoding`` does so on all cores. ``shards`` is the file format. ``preparation`` turns a corpus into a folder of
shards, once (``manifest``, ``writing``, ``progress``). ``loader`` reads batches from it; ``windows`` decides which tokens and
in what order, and ``verification`` checks that no id is past the vocabulary. ``resolution`` puts them together: it turns
the value of ``--data`` into shards to train on. ``python -m fastgpt.data --help`` is the command.
"""
