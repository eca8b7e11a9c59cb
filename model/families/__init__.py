"""Published models: the config.json and the weight names of Hugging Face directories, in both directions."""
