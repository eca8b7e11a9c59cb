"""Related documents in one context, as in In-Context Pretraining (arXiv 2310.10638).

`longring order` embeds the documents of prepared data, finds the neighbours of each, drops near-duplicates, walks a
path along the most similar documents and cuts it into contexts. The result is prepared data again, which training reads
like any other.
"""
