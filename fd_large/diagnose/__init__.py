"""What a net attends to, how flat its loss is, and how alike two nets are."""
