"""Methods for several teachers: the choice of each image's teachers, normalisers, losses, mosaics.
"""
