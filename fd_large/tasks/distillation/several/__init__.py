"""Several teachers: which of them each image learns from, and what one of them sees at once."""
