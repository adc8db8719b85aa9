"""Operations with a plain reference and, where present, a faster twin."""
