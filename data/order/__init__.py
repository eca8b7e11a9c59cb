"""Related documents in one context: In-Context Pretraining (arXiv 2310.10638), and Untie the Knots (arXiv 2409.04774).

`order` embeds the documents of prepared data, finds each one's neighbours, leaves out near-duplicates, walks a path
along the most similar ones, and cuts it into contexts: prepared data again, which training reads like any other. The
knots are tied by the loader, on the fly.
"""
