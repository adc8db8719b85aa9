"""What a model attends to, how flat its loss is, and how alike two models are."""
