"""Vision models of transformers as frozen teachers, built from the config.json of their folder."""
